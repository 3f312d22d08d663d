"""An EAGLE head under vLLM's scheduler: its pages, and hits whose last block vLLM drops for it."""

from __future__ import annotations

from random import Random
from types import SimpleNamespace

import pytest
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from tests.kv_cache.caches import Engine, two_bins
from tests.kv_cache.histories import History
from tests.kv_cache.test_histories import MASKS, history_of, patterns, run  # noqa: F401
from vllm_duo.kv_cache.snapshot_manager import SnapshotManager
from vllm_duo.kv_cache.snapshot_policy import Reason

BLOCK = 16


@pytest.fixture(scope="module")
def cached():
    """The pages of a prompt of ten blocks and snapshots at all of their ends; the prompt's hashes."""
    engine = Engine(two_bins(), enable_caching=True, use_eagle=True)
    request = engine.request("first", 10 * BLOCK)
    assert engine.step(request, 10 * BLOCK)
    for manager in engine.manager.coordinator.single_type_managers[1:]:
        for index, prefix in enumerate(request.block_hashes):
            end = (index + 1) * BLOCK
            if manager.snapshots.find(prefix, manager.span.blocks(end)) is None:
                blocks = manager.snapshots.claim(manager.span.blocks(end), reserve=0)
                manager.snapshots.publish(blocks, prefix, end, Reason.BRANCH)
    return engine, request.block_hashes


@pytest.mark.parametrize("drop", [False, True])
def test_rings_drop_what_full_attention_drops(cached, drop):
    engine, hashes = cached
    managers = engine.manager.coordinator.single_type_managers
    assert isinstance(managers[0], FullAttentionManager)
    assert all(isinstance(manager, SnapshotManager) for manager in managers[1:])
    for tokens in range(11 * BLOCK):
        lengths = []
        for group, manager in enumerate(managers):
            (blocks,), length = manager.find_longest_cache_hit(
                block_hashes=hashes,
                max_length=tokens,
                kv_cache_group_ids=[group],
                block_pool=engine.pool,
                kv_cache_spec=manager.kv_cache_spec,
                drop_eagle_block=drop,
                alignment_tokens=BLOCK,
            )
            lengths.append(length)
            if group > 0:
                assert len(blocks) == manager.span.blocks(length)
        assert lengths[0] == max(min(tokens, 10 * BLOCK) // BLOCK - drop, 0) * BLOCK
        # Beyond the prompt's own end full attention drops the last page, a ring what lies beyond.
        longest = max(tokens // BLOCK - drop, 0) * BLOCK
        assert lengths[1:] == [min(longest, 10 * BLOCK)] * 2


def test_vllm_drops_a_block_of_every_group(cached):
    """No group is marked as the head's, so vLLM goes by all of them, and a hit ends where all can."""
    engine, hashes = cached
    coordinator = engine.manager.coordinator
    assert coordinator.eagle_group_ids == {0, 1, 2}
    assert all(manager.use_eagle for manager in coordinator.single_type_managers)
    for tokens in range(1, 10 * BLOCK):
        blocks, length, _ = coordinator.find_longest_cache_hit(
            hashes[: (tokens + 1) // BLOCK], tokens
        )
        assert length == max((tokens + 1) // BLOCK - 1, 0) * BLOCK
        assert len(blocks[0]) == length // BLOCK


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("name", MASKS)
def test_many_steps(name, caching):
    history = history_of(name, caching, "fcfs", 16, interval=12, drafts=3, eagle=True)
    run(history, Random(name), 150)
    counts = history.counts
    assert counts["preempted"] > 0 or name == "only windows"
    assert (counts["hits"] > 0) == caching
    assert min(counts["accepted"], counts["rejected"]) > 100


def turns(answer: int) -> History:
    """A prompt of 30 tokens and its answer, then a turn that goes on from there."""
    history = history_of("several bins", True, "fcfs", 48, interval=40, drafts=3, eagle=True)
    # No drafts: of those that are accepted in an answer's last step nothing is kept.
    history.random = SimpleNamespace(randrange=lambda stop: 0)
    history.add(0, 0, 30, answer)
    history.drain()
    history.add(1, 160, 5, 1)
    history.drain()
    return history


@pytest.mark.parametrize("answer", range(40, 56))
def test_a_chat_resumes_a_block_before_the_last_snapshot_that_it_may(answer):
    """Blocks of 4 tokens, and of each answer the last two multiples of 8 are kept."""
    known = 30 + answer - 1  # of the last token there are no keys yet
    assert turns(answer).counts["hits"] == (known // 4 - 1) * 4 // 8 * 8
