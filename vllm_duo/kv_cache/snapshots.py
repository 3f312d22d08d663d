"""Snapshots of streaming state in vLLM's block pool, found again by the prefix's hash.

A snapshot's blocks belong to nobody: they lie in the pool's free queue with a hash, as every block
does that vLLM keeps for prefix hits, and go to whoever needs a block, the least recently used first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock


def snapshot_key(prefix: BlockHash, index: int, group_id: int) -> BlockHashWithGroupId:
    """The pool's key of a snapshot's block.

    Args:
        prefix: vLLM's hash of the prefix that ends at the boundary.
        index: block of the snapshot, in table order.
        group_id: vLLM's KV cache group.
    """
    return make_block_hash_with_group_id(
        BlockHash(prefix + b"duo" + index.to_bytes(2, "big")), group_id
    )


def find_snapshot(
    pool: BlockPool, prefix: BlockHash, num_blocks: int, group_id: int
) -> list[KVCacheBlock] | None:
    """The blocks of a whole snapshot at the end of ``prefix``; None if any of them is gone."""
    cached = pool.cached_block_hash_to_block
    blocks = []
    for index in range(num_blocks):
        block = cached.get_one_block(snapshot_key(prefix, index, group_id))
        if block is None:
            return None
        blocks.append(block)
    return blocks


@dataclass(slots=True)
class Snapshot:
    """A stored state and the keys it was stored under, by which it is known to be still there.

    Attributes:
        num_tokens: boundary.
        blocks: its pool blocks, which may since have gone to somebody else.
        keys: the keys they had.
    """

    num_tokens: int
    blocks: Sequence[KVCacheBlock]
    keys: Sequence[BlockHashWithGroupId]

    def is_whole(self) -> bool:
        """Whether every block still holds what was stored."""
        return all(
            block.block_hash == key for block, key in zip(self.blocks, self.keys, strict=True)
        )


class SnapshotPool:
    """Stores, finds again and forgets one group's snapshots.

    Blocks of the current step's orders are held until ``release``, so that nobody in the same step
    is given them.

    Args:
        pool: vLLM's block pool.
        group_id: vLLM's KV cache group.
    """

    def __init__(self, pool: BlockPool, group_id: int) -> None:
        self.pool = pool
        self.group_id = group_id
        self.held: list[KVCacheBlock] = []

    def find(self, prefix: BlockHash, num_blocks: int) -> list[KVCacheBlock] | None:
        """As ``find_snapshot``, in this pool and group."""
        return find_snapshot(self.pool, prefix, num_blocks, self.group_id)

    def hold(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Keep blocks from being given away until ``release``; they become most recently used."""
        self.pool.touch(blocks)
        self.held.extend(blocks)

    def claim(self, num_blocks: int, reserve: int) -> list[KVCacheBlock] | None:
        """Take blocks for a new snapshot.

        Args:
            num_blocks: blocks of the snapshot.
            reserve: free blocks to leave for running requests.

        Returns:
            The blocks, held until ``release``; None if the pool would run short.
        """
        if self.pool.get_num_free_blocks() < num_blocks + reserve:
            return None
        blocks: list[KVCacheBlock] = self.pool.get_new_blocks(num_blocks)
        self.held.extend(blocks)
        return blocks

    def publish(
        self, blocks: Sequence[KVCacheBlock], prefix: BlockHash, num_tokens: int
    ) -> Snapshot:
        """Make held blocks findable as the state at the end of ``prefix``."""
        keys = [snapshot_key(prefix, index, self.group_id) for index in range(len(blocks))]
        for block, key in zip(blocks, keys, strict=True):
            self.pool._insert_block_hash(key, block, num_tokens=num_tokens)
        return Snapshot(num_tokens, blocks, keys)

    def forget(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Nobody shall find these blocks any more."""
        self.pool.evict_blocks({block.block_id for block in blocks})

    def give(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Give held blocks to the caller, who will write into them."""
        given = {block.block_id for block in blocks}
        self.held = [block for block in self.held if block.block_id not in given]
        self.forget(blocks)

    def refresh(self, snapshot: Snapshot) -> None:
        """Make a snapshot most recently used, if it is still there."""
        if snapshot.is_whole():
            self.pool.touch(snapshot.blocks)
            self.pool.free_blocks(snapshot.blocks)

    def release(self) -> None:
        """Let go of what the step held; findable blocks stay in the pool as cached."""
        held, self.held = self.held, []
        self.pool.free_blocks(held)
