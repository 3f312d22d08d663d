"""The coordinator's short way says what vLLM's own way would, in the state it is asked in."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator

from benchmarks.simulated_engine import make_engine
from tests.kv_cache.test_histories import CASES, history_of, patterns, run  # noqa: F401
from vllm_duo.kv_cache.coordinator import SteadyCoordinator
from vllm_duo.kv_cache.manager import RingManager
from vllm_duo.kv_cache.snapshot_manager import SnapshotManager


@pytest.fixture
def answers(monkeypatch):
    """How often each way was taken; the short one is held against vLLM's each time."""
    counts: Counter[str] = Counter()
    wrapped = {
        name: getattr(SteadyCoordinator, name)
        for name in ("get_num_blocks_to_allocate", "allocate_new_blocks", "cache_blocks")
    }

    def missing(self, request_id, num_tokens, *args, **kwargs):
        answer = wrapped["get_num_blocks_to_allocate"](
            self, request_id, num_tokens, *args, **kwargs
        )
        assert answer == KVCacheCoordinator.get_num_blocks_to_allocate(
            self, request_id, num_tokens, *args, **kwargs
        )
        counts["missing, short" if num_tokens <= self._room.get(request_id, 0) else "missing"] += 1
        return answer

    def allocate(self, request_id, num_tokens, *args, **kwargs):
        short = num_tokens <= self._room.get(request_id, 0)
        answer = wrapped["allocate_new_blocks"](self, request_id, num_tokens, *args, **kwargs)
        if short:
            assert not any(answer)
            own = KVCacheCoordinator.allocate_new_blocks(
                self, request_id, num_tokens, *args, **kwargs
            )
            assert not any(own)
        counts["allocate, short" if short else "allocate"] += 1
        return answer

    def cache(self, request, num_computed_tokens):
        short = num_computed_tokens < self._uncached.get(request.request_id, 0)
        wrapped["cache_blocks"](self, request, num_computed_tokens)
        if short:
            before = cached_state(self)
            KVCacheCoordinator.cache_blocks(self, request, num_computed_tokens)
            assert cached_state(self) == before
        counts["cache, short" if short else "cache"] += 1

    monkeypatch.setattr(SteadyCoordinator, "get_num_blocks_to_allocate", missing)
    monkeypatch.setattr(SteadyCoordinator, "allocate_new_blocks", allocate)
    monkeypatch.setattr(SteadyCoordinator, "cache_blocks", cache)
    return counts


def cached_state(coordinator):
    """All that caching could change: counts, hashes and snapshot orders."""
    managers = coordinator.single_type_managers
    return (
        [dict(manager.num_cached_block) for manager in managers],
        [
            (list(manager._orders), list(manager._late))
            for manager in managers
            if isinstance(manager, SnapshotManager)
        ],
        len(coordinator.block_pool.cached_block_hash_to_block._cache),
    )


@pytest.mark.parametrize(("name", "caching", "policy", "chunk", "drafts"), CASES[::5])
def test_short_answers_are_vllms_own(name, caching, policy, chunk, drafts, answers):
    run(history_of(name, caching, policy, chunk, 12, drafts), Random(name), 150)
    ways = ["missing", "allocate"] + ["cache"] * caching
    for way in [*ways, *(f"{way}, short" for way in ways)]:
        assert answers[way] > 0, way


def test_nothing_is_remembered_of_requests_that_are_gone():
    history = history_of("one bin", True, "priority", 16, interval=12)
    run(history, Random(0), 100)
    coordinator = history.engine.manager.coordinator
    assert isinstance(coordinator, SteadyCoordinator)
    assert coordinator._room == coordinator._uncached == {}


def test_stock_servers_keep_vllms_coordinator():
    engine = make_engine("stock", "llama-3.1-8b", pool_bytes=1 << 33)
    assert not isinstance(engine.manager.coordinator, SteadyCoordinator)


def test_an_unknown_manager_is_asked_in_every_step(monkeypatch):
    monkeypatch.setattr("vllm_duo.kv_cache.coordinator.FullAttentionManager", RingManager)
    engine = make_engine("duo", "llama-3.1-8b", pool_bytes=1 << 33)
    assert not isinstance(engine.manager.coordinator, SteadyCoordinator)
