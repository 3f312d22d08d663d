"""Snapshots of streaming state in vLLM's block pool, found again by the prefix's hash.

A snapshot's blocks belong to nobody: they lie in the pool's free queue with a hash, as every block
does that vLLM keeps for prefix hits, and go to whoever needs a block, the least recently used first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    get_block_hash,
    make_block_hash_with_group_id,
)

from vllm_duo.kv_cache.snapshot_policy import Reason

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashWithGroupId, KVCacheBlock


def snapshot_key(
    prefix: BlockHash, index: int, num_blocks: int, group_id: int
) -> BlockHashWithGroupId:
    """The pool's key of a snapshot's block.

    Args:
        prefix: vLLM's hash of the prefix that ends at the boundary.
        index: block of the snapshot, in table order.
        num_blocks: blocks of the snapshot.
        group_id: vLLM's KV cache group.
    """
    place = index.to_bytes(2, "big") + num_blocks.to_bytes(2, "big")
    return make_block_hash_with_group_id(BlockHash(prefix + b"duo" + place), group_id)


def parse_key(key: BlockHashWithGroupId) -> tuple[BlockHash, int, int]:
    """Prefix, index and number of blocks of a ``snapshot_key``."""
    name = get_block_hash(key)
    return (
        BlockHash(name[:-7]),
        int.from_bytes(name[-4:-2], "big"),
        int.from_bytes(name[-2:], "big"),
    )


def find_snapshot(
    pool: BlockPool, prefix: BlockHash, num_blocks: int, group_id: int
) -> list[KVCacheBlock] | None:
    """The blocks of a whole snapshot at the end of ``prefix``; None if any of them is gone."""
    cached = pool.cached_block_hash_to_block
    blocks = []
    for index in range(num_blocks):
        block = cached.get_one_block(snapshot_key(prefix, index, num_blocks, group_id))
        if block is None:
            return None
        blocks.append(block)
    return blocks


@dataclass(slots=True, eq=False)
class Snapshot:
    """A stored state and the keys it was stored under, by which it is known to be still there.

    Attributes:
        num_tokens: boundary.
        blocks: its pool blocks, which may since have gone to somebody else.
        keys: the keys they had.
        reason: why it was stored.
        hits: requests that resumed at it.
    """

    num_tokens: int
    blocks: Sequence[KVCacheBlock]
    keys: Sequence[BlockHashWithGroupId]
    reason: Reason
    hits: int = 0

    def is_whole(self) -> bool:
        """Whether every block still holds what was stored."""
        return all(
            block.block_hash == key for block, key in zip(self.blocks, self.keys, strict=True)
        )

    def is_idle(self) -> bool:
        """Whether every block is in the pool's free queue."""
        return all(block.ref_cnt == 0 for block in self.blocks)


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
        # By the id of the first block, so there are never more than the pool has blocks.
        self._known: dict[int, Snapshot] = {}
        self._retired: list[Snapshot] = []

    def find(self, prefix: BlockHash, num_blocks: int) -> list[KVCacheBlock] | None:
        """As ``find_snapshot``, in this pool and group."""
        return find_snapshot(self.pool, prefix, num_blocks, self.group_id)

    def known(self, blocks: Sequence[KVCacheBlock], num_tokens: int) -> Snapshot:
        """The snapshot that was published in these blocks, which have keys."""
        snapshot = self._known.get(blocks[0].block_id)
        if snapshot is None or list(snapshot.blocks) != list(blocks) or not snapshot.is_whole():
            # Put together from the remains of two: of unknown use, so it is kept as a shared one.
            keys = [cast("BlockHashWithGroupId", block.block_hash) for block in blocks]
            snapshot = Snapshot(num_tokens, blocks, keys, Reason.BRANCH)
        return snapshot

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
        self, blocks: Sequence[KVCacheBlock], prefix: BlockHash, num_tokens: int, reason: Reason
    ) -> Snapshot:
        """Make held blocks findable as the state at the end of ``prefix``."""
        size = len(blocks)
        keys = [snapshot_key(prefix, index, size, self.group_id) for index in range(size)]
        for block, key in zip(blocks, keys, strict=True):
            self.pool._insert_block_hash(key, block, num_tokens=num_tokens)
        snapshot = Snapshot(num_tokens, blocks, keys, reason)
        self._known[blocks[0].block_id] = snapshot
        return snapshot

    def forget(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Nobody shall find these blocks any more."""
        self.pool.evict_blocks({block.block_id for block in blocks})

    def refresh(self, snapshot: Snapshot) -> None:
        """Make a snapshot most recently used, if it is still there."""
        if snapshot.is_whole():
            self.pool.touch(snapshot.blocks)
            self.pool.free_blocks(snapshot.blocks)

    def retire(self, snapshot: Snapshot) -> None:
        """Let a snapshot go before anything else in the cache, once the pool is full."""
        if snapshot.is_whole():
            self._retired.append(snapshot)

    def release(self) -> None:
        """Let go of what the step held; findable blocks stay in the pool as cached."""
        held, self.held = self.held, []
        self.pool.free_blocks(held)
        self._yield_retired()

    def _yield_retired(self) -> None:
        """Move retired snapshots to the head of the free queue if only cached blocks are left there.

        vLLM's free queue begins with the blocks that hold nothing, so its head tells.
        """
        queue = self.pool.free_block_queue
        head = queue.fake_free_list_head.next_free_block
        if not self._retired or head is None or head.block_hash is None:
            return
        for snapshot in self._retired:
            if snapshot.is_whole() and snapshot.is_idle():
                for block in snapshot.blocks:
                    queue.remove(block)
                queue.prepend_n(list(snapshot.blocks))
        self._retired.clear()
