"""A snapshot is there while every one of its blocks still holds what was stored in it, no longer."""

from __future__ import annotations

import pytest
from vllm.v1.core.kv_cache_utils import BlockHash

from tests.kv_cache.caches import Engine, two_bins
from vllm_duo.kv_cache.snapshot_policy import Reason
from vllm_duo.kv_cache.snapshots import SnapshotPool

PREFIX, OTHER = BlockHash(b"a" * 32), BlockHash(b"b" * 32)
SIZE = 3


@pytest.fixture
def pool():
    """Of ten blocks, one of them vLLM's null block."""
    return Engine(two_bins(), num_blocks=10, enable_caching=True).pool


@pytest.fixture
def snapshots(pool):
    return SnapshotPool(pool, group_id=1)


def store(snapshots, prefix=PREFIX):
    blocks = snapshots.claim(SIZE, reserve=0)
    found = snapshots.publish(blocks, prefix, 32, Reason.BRANCH)
    snapshots.release()
    return found


def queue(pool):
    return [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]


def test_it_is_whole_once_stored_and_idle_once_released(snapshots):
    snapshot = store(snapshots)
    assert snapshot.is_whole()
    assert snapshot.is_idle()
    assert snapshots.find(PREFIX, SIZE) == list(snapshot.blocks)


@pytest.mark.parametrize("index", range(SIZE))
def test_without_any_one_of_its_blocks_it_is_not(pool, snapshots, index):
    snapshot = store(snapshots)
    pool.evict_blocks({snapshot.blocks[index].block_id})
    assert not snapshot.is_whole()
    assert snapshots.find(PREFIX, SIZE) is None


def test_blocks_that_hold_another_snapshot_now_are_not_its_own(pool, snapshots):
    first = store(snapshots)
    taken = pool.get_new_blocks(len(queue(pool)) - SIZE)
    second = store(snapshots, OTHER)
    pool.free_blocks(taken)
    assert {b.block_id for b in second.blocks} == {b.block_id for b in first.blocks}
    assert second.is_whole()
    assert not first.is_whole()


@pytest.mark.parametrize("act", ["refresh", "retire"])
def test_the_rest_of_a_broken_one_keeps_its_place(pool, snapshots, act):
    """Moved to either end of the queue it would outlive what is used, or go before what is not."""
    snapshot = store(snapshots)
    store(snapshots, OTHER)
    empty = pool.get_new_blocks(len(queue(pool)) - 2 * SIZE)  # only what is cached is left
    pool.evict_blocks({snapshot.blocks[0].block_id})
    before = queue(pool)
    getattr(snapshots, act)(snapshot)
    snapshots.release()
    assert queue(pool) == before
    pool.free_blocks(empty)


def test_one_that_is_whole_is_moved(pool, snapshots):
    first = store(snapshots)
    second = store(snapshots, OTHER)
    pool.get_new_blocks(len(queue(pool)) - 2 * SIZE)
    assert queue(pool)[:SIZE] == [b.block_id for b in first.blocks]
    snapshots.refresh(first)
    assert set(queue(pool)[SIZE:]) == {b.block_id for b in first.blocks}
    snapshots.retire(first)
    snapshots.release()
    assert set(queue(pool)[:SIZE]) == {b.block_id for b in first.blocks}
    assert set(queue(pool)[SIZE:]) == {b.block_id for b in second.blocks}
