"""The accounts of vLLM's block pool with both classes in it, checked between two steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_duo.kv_cache.manager import RingManager

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


def check_integrity(kv_cache_manager: KVCacheManager, lent: Sequence[KVCacheBlock] = ()) -> None:
    """Check that free + held == total and that every table is sound; cached blocks are free ones.

    Costs a walk through the whole pool: for tests and for finding a defect, not for every step of a
    server.

    Args:
        kv_cache_manager: vLLM's, between two steps.
        lent: blocks that somebody else holds, each once.

    Raises:
        RuntimeError: a block is in no table but held, in more tables than it is held for, or free in
            a table; a streaming block is shared or a ring longer than its formula; the null block is
            in a table; the free list disagrees; or a block has a hash by which it is not found.
    """
    pool = kv_cache_manager.block_pool
    holders = Counter(block.block_id for block in lent)
    for manager in kv_cache_manager.coordinator.single_type_managers:
        for request_id, table in manager.req_to_blocks.items():
            if any(block.is_null for block in table):
                raise RuntimeError(f"request {request_id} holds the null block")
            holders.update(block.block_id for block in table)
        if isinstance(manager, RingManager):
            manager.allocator.check_integrity()
            shared = [
                block.block_id
                for table in manager.req_to_blocks.values()
                for block in table
                if holders[block.block_id] > 1
            ]
            if shared:
                raise RuntimeError(f"streaming blocks {shared} are in more than one table")
    wrong = [
        f"block {block.block_id}: held {block.ref_cnt} times, in {holders[block.block_id]} tables"
        for block in pool.blocks
        if not block.is_null and block.ref_cnt != holders[block.block_id]
    ]
    if wrong:
        raise RuntimeError("; ".join(wrong))
    free = {block.block_id for block in pool.free_block_queue.get_all_free_blocks()}
    expected = {block.block_id for block in pool.blocks if not block.is_null} - set(holders)
    if free != expected or pool.get_num_free_blocks() != len(free):
        raise RuntimeError(
            f"free blocks: expected {len(expected)}, the free list has {len(free)} and counts "
            f"{pool.get_num_free_blocks()}; they differ by {sorted(free ^ expected)}"
        )
    for block in pool.blocks:
        key = block.block_hash
        if key is not None and not pool.cached_block_hash_to_block.contain(key, block.block_id):
            raise RuntimeError(f"block {block.block_id} has a hash by which it is not found")
