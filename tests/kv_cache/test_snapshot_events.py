"""KV cache events of both classes: a consumer knows what the pool holds, after every step."""

from __future__ import annotations

from collections import Counter, defaultdict
from random import Random

import pytest
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import (
    get_block_hash,
    get_group_id,
    maybe_convert_block_hash,
)

from tests.cache_events import Consumer
from tests.kv_cache.test_histories import BLOCK_SIZE, history_of, patterns, run  # noqa: F401
from vllm_duo.kv_cache.snapshot_manager import SnapshotManager
from vllm_duo.kv_cache.snapshots import parse_key, snapshot_key

NAMES = ("several bins", "one bin", "only streaming")


def groups_of(history):
    """KV cache groups of pages, and those of rings."""
    managers = history.engine.manager.coordinator.single_type_managers
    rings = [m.kv_cache_group_id for m in managers if isinstance(m, SnapshotManager)]
    return [m.kv_cache_group_id for m in managers if m.kv_cache_group_id not in rings], rings


def held_by(history):
    """By group, the blocks of tokens that the pool has pages of, or whole snapshots at the end of."""
    pool = history.engine.manager.block_pool
    _, rings = groups_of(history)
    found, parts = defaultdict(Counter), defaultdict(set)
    for block in pool.blocks:
        key = block.block_hash
        if key is None:
            continue
        group = get_group_id(key)
        if group in rings:
            prefix, index, size = parse_key(key)
            parts[group, prefix, size].add(index)
        else:
            found[group][maybe_convert_block_hash(get_block_hash(key))] += 1
    for (group, prefix, size), indices in parts.items():
        if indices == set(range(size)):
            found[group][maybe_convert_block_hash(prefix)] = 1
    return found


@pytest.fixture
def watched():
    """Makes a history whose events are consumed and compared after every step."""

    def watched(name, drafts=0, policy="priority"):
        history = history_of(name, True, policy, 48, interval=12, drafts=drafts, events=True)
        consumer = history.engine.scheduler.kv_event_publisher = Consumer()
        step = history.step

        def step_and_compare():
            step()
            told = {group: own for group, own in consumer.groups.items() if own}
            assert told == held_by(history)

        history.step = step_and_compare
        return history, consumer

    return watched


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_consumer_knows_what_the_pool_holds(watched, name, drafts):
    history, consumer = watched(name, drafts)
    run(history, Random(f"{name} {drafts}"), 200)
    history.reset(running=False)
    run(history, Random(0), 230)
    paged, rings = groups_of(history)
    removed = Counter(e.group_idx for e in consumer.events if isinstance(e, BlockRemoved))
    assert all(removed[group] > 20 for group in (*paged, *rings))
    assert any(isinstance(event, AllBlocksCleared) for event in consumer.events)
    assert history.counts["preempted"] > 0
    assert all(consumer.kinds[group] == {"full_attention"} for group in paged)
    assert all(consumer.kinds[group] == {"unknown"} for group in rings)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_resumes_where_every_group_tells(watched, name):
    history, consumer = watched(name)
    run(history, Random(name), 120)
    paged, rings = groups_of(history)
    hits = []
    for index, text in enumerate(history.ended):
        history.engine.add(f"next {index}", [*text, 0], max_tokens=1)
        request = history.engine.scheduler.requests[f"next {index}"]
        hashes = [maybe_convert_block_hash(block) for block in request.block_hashes]
        whole = hashes[: (request.num_tokens - 1) // BLOCK_SIZE]
        hits.append(history.engine.manager.get_computed_blocks(request)[1])
        assert hits[-1] == BLOCK_SIZE * consumer.resumable(whole, paged, rings)
    assert sum(hits) > 0


def test_a_streaming_group_tells_of_the_prefixs_last_block(watched):
    history, consumer = watched("one bin")
    prompt = list(range(30))
    history.engine.add("a", prompt, max_tokens=2, cache_salt="salt")
    history.drain()
    ((page,), (ring,)) = groups_of(history)
    stored = [event for event in consumer.events if isinstance(event, BlockStored)]
    (last,) = (e for e in stored if e.group_idx == ring and e.token_ids == prompt[24:28])
    pages = [h for e in stored if e.group_idx == page for h in e.block_hashes]
    # 7 whole blocks of 4 tokens: the last one's hash, after that of the one before.
    assert [last.parent_block_hash, *last.block_hashes] == pages[5:7]
    assert last.block_size == BLOCK_SIZE
    assert last.extra_keys == [None]
    (first,) = (e for e in stored if e.group_idx == page and e.parent_block_hash is None)
    assert first.extra_keys[0] == ("salt",)


def test_a_hit_is_told_again_where_a_request_asks_for_it(watched):
    history, consumer = watched("several bins")
    prompt = list(range(30))
    history.engine.add("a", prompt, max_tokens=1)
    history.drain()
    del consumer.events[:]
    history.engine.add(
        "b", prompt, max_tokens=1, sampling={"extra_args": {"kv_cache_report_mode": "full"}}
    )
    scheduler = history.engine.scheduler
    history.engine.manager.get_computed_blocks(scheduler.requests["b"])
    events = history.engine.manager.take_events()
    ((page,), rings) = groups_of(history)
    told = {event.group_idx: event for event in events}
    assert told.keys() == {page, *rings}
    assert told[page].token_ids == prompt[:28]
    for ring in rings:
        assert told[ring].token_ids == prompt[24:28]
        assert told[ring].block_hashes == told[page].block_hashes[-1:]


def test_nothing_is_queued_without_consumers():
    history = history_of("one bin", True, "fcfs", 48, interval=12)
    run(history, Random(0), 60)
    assert history.engine.manager.block_pool.kv_event_queue == []


def test_a_key_names_its_place():
    assert parse_key(snapshot_key(b"x" * 32, 258, 300, 7)) == (b"x" * 32, 258, 300)
