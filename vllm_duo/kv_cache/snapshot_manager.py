"""The ring manager of a server with prefix caching: rings, and snapshots of them for later hits.

A request holds its ring and no more, as without prefix caching. What later requests resume at are
*snapshots*: copies of the streaming state at block boundaries, free blocks with a hash. They are
stored

- at multiples of ``snapshot_interval``,
- at the last block boundary of the prompt, where the next turn of a chat resumes,
- while an answer is generated, every ``ANSWER_INTERVAL`` tokens, each in place of the one before,
- where a prompt was found to part from an earlier one: the retrieval blocks reached further than any
  snapshot, so the next request with this prefix will resume there (vLLM's
  ``Request.shared_prefix_boundary``; the admission rule of Marconi, arXiv:2411.19379).

A snapshot is stored only from blocks that no running request can need in the step, so prefix caching
never delays or preempts one. A request that resumes at a snapshot gets a copy of it as its ring; where
the pool has no room for both, the snapshot itself becomes the ring, so a hit never keeps a request out
that would fit without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

from vllm.v1.core.kv_cache_utils import resolve_block_hashes

from vllm_duo.kv_cache.layout import cdiv
from vllm_duo.kv_cache.manager import RingManager
from vllm_duo.kv_cache.orders import SnapshotOrder
from vllm_duo.kv_cache.snapshots import Snapshot, SnapshotPool, find_snapshot

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.request import Request

    from vllm_duo.kv_cache.spec import StreamingSpec

ANSWER_INTERVAL = 128
"""Tokens between the snapshots of an answer, rounded up to whole blocks."""


class SnapshotManager(RingManager):
    """Streaming blocks of one bin, with snapshots for prefix hits."""

    def __init__(self, kv_cache_spec: StreamingSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        spec = kv_cache_spec
        self.span = spec.span
        self.snapshots = SnapshotPool(self.block_pool, self.kv_cache_group_id)
        self.bin = spec.bin
        # Blocks that the running requests of a step may still claim: one for each started block of
        # its tokens, one more a request, and what their rings miss (in every bin).
        self._step_blocks = cdiv(spec.max_step_tokens, self.block_size)
        self._num_bins = spec.num_bins
        self._interval = max(cdiv(spec.snapshot_interval, self.block_size), 1) * self.block_size
        self._answer_interval = cdiv(ANSWER_INTERVAL, self.block_size) * self.block_size
        self._orders: list[SnapshotOrder] = []
        # By request: the snapshot that its answer replaces, and those to keep when it ends.
        self._answers: dict[str, Snapshot] = {}
        self._kept: dict[str, list[Snapshot]] = {}
        # The hit of the request that is just being admitted.
        self._resuming: Snapshot | None = None
        self.hits = 0
        self.hit_tokens = 0
        self.stored = 0

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix of at most ``max_length`` tokens with a whole snapshot in each group.

        Returns:
            Per group the snapshot's blocks (not one a block of tokens), and the prefix's tokens.
        """
        spec = cast("StreamingSpec", kv_cache_spec)
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, spec.block_size)
        span = spec.span
        step = max(alignment_tokens // spec.block_size, 1)
        longest = min(max_length // spec.block_size, len(hashes)) // step * step
        for num_blocks in range(longest, 0, -step):
            size = span.blocks(num_blocks * spec.block_size)
            prefix = hashes[num_blocks - 1]
            found = []
            for group_id in kv_cache_group_ids:
                blocks = find_snapshot(block_pool, prefix, size, group_id)
                if blocks is None:
                    break
                found.append(blocks)
            else:
                return tuple(found), num_blocks * spec.block_size
        return tuple([] for _ in kv_cache_group_ids), 0

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks that the next claim takes from the pool.

        A snapshot that nobody reads counts among them, since it may become the ring; the rest of one
        that is read in this step comes on top.
        """
        missing = self.allocator.missing_blocks(request_id, num_tokens)
        evictable: int = self._get_num_evictable_blocks(new_computed_blocks)
        return missing if evictable == len(new_computed_blocks) else missing + evictable

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Keep the hit's blocks from being given away; the request's ring is claimed next."""
        if num_external_computed_tokens > 0:
            self._refuse_hits(request_id, (), num_external_computed_tokens)
        self.num_cached_block[request_id] = num_local_computed_tokens // self.block_size
        if not new_computed_blocks:
            if num_local_computed_tokens > 0:
                self._refuse_hits(request_id, (), num_local_computed_tokens)
            return
        self.snapshots.hold(new_computed_blocks)
        keys = [block.block_hash for block in new_computed_blocks]
        assert None not in keys, "a hit's blocks have hashes"
        self._resuming = Snapshot(
            num_local_computed_tokens, tuple(new_computed_blocks), cast("Any", keys)
        )
        self.hits += 1
        self.hit_tokens += num_local_computed_tokens

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Claim what ``num_tokens`` tokens need, and order a hit's state to be copied there."""
        hit, self._resuming = self._resuming, None
        if hit is None:
            return self.allocator.claim(request_id, num_tokens)
        if self._has_room_beside(self.allocator.missing_blocks(request_id, num_tokens)) or any(
            block.ref_cnt > 1 for block in hit.blocks
        ):
            self._kept.setdefault(request_id, []).append(hit)
            self._order(False, request_id, hit.num_tokens, hit.blocks)
        else:
            self.snapshots.give(hit.blocks)
            self.allocator.adopt(request_id, hit.blocks)
        self.allocator.claim(request_id, num_tokens)
        return list(self.allocator.tables[request_id])

    def _has_room_beside(self, missing: int) -> bool:
        """Whether this bin and those after it can all claim whole rings."""
        free: int = self.block_pool.get_num_free_blocks()
        return free >= missing * (self._num_bins - self.bin)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Order the snapshots that this step's tokens pass.

        Args:
            request: the request.
            num_tokens: its tokens after the step, those already cached included.
            retention_interval: vLLM's own, for its own specs; not used.
            replay_boundaries: where vLLM expects the prompt to be resumed.
        """
        request_id = request.request_id
        num_blocks = num_tokens // self.block_size
        done = self.num_cached_block.get(request_id, 0)
        if num_blocks <= done:
            return
        self.num_cached_block[request_id] = num_blocks
        size = self.block_size
        prompt_end = max(replay_boundaries) // size * size
        kept = {prompt_end, request.shared_prefix_boundary // size * size}
        for boundary in self._boundaries(done * size, num_blocks * size, prompt_end, kept):
            self._store(request, boundary, boundary in kept, boundary > prompt_end)

    def _boundaries(self, low: int, high: int, prompt_end: int, kept: set[int]) -> Iterator[int]:
        """Where to store, in tokens, after ``low`` up to ``high``, ascending."""
        points = {point for point in kept if low < point <= high}
        first = (low // self._interval + 1) * self._interval
        points.update(range(first, high + 1, self._interval))
        if high > prompt_end:
            # Of an answer only the last one counts: each takes the place of the one before.
            last = high // self._answer_interval * self._answer_interval
            if last > max(low, prompt_end):
                points.add(last)
        return iter(sorted(points))

    def _store(self, request: Request, boundary: int, kept: bool, in_answer: bool) -> None:
        request_id = request.request_id
        hashes = resolve_block_hashes(
            request.block_hashes, self.block_pool.hash_block_size, self.block_size
        )
        prefix = hashes[boundary // self.block_size - 1]
        size = self.span.blocks(boundary)
        if self.snapshots.find(prefix, size) is not None:
            return
        blocks = self._replaced_blocks(request_id, size) if in_answer else None
        if blocks is None:
            blocks = self.snapshots.claim(size, self._reserve())
        if blocks is None:
            return
        snapshot = self.snapshots.publish(blocks, prefix, boundary)
        self._order(True, request_id, boundary, blocks)
        self.stored += 1
        if in_answer and boundary % self._interval:
            self._answers[request_id] = snapshot
        elif kept:
            self._kept.setdefault(request_id, []).append(snapshot)

    def _replaced_blocks(self, request_id: str, size: int) -> Sequence[KVCacheBlock] | None:
        """The blocks of the answer's snapshot before, if they are still there and nobody uses them."""
        before = self._answers.pop(request_id, None)
        if before is None or len(before.blocks) != size or not before.is_whole():
            return None
        if any(block.ref_cnt > 0 for block in before.blocks):
            return None
        self.snapshots.hold(before.blocks)
        self.snapshots.forget(before.blocks)
        return before.blocks

    def _reserve(self) -> int:
        """Free blocks that the step's running requests may still need, at most."""
        rings = self._num_bins * self.allocator.growing_blocks()
        return self._step_blocks + len(self.allocator.tables) + rings

    def _order(
        self, store: bool, request_id: str, num_tokens: int, blocks: Sequence[KVCacheBlock]
    ) -> None:
        ids = tuple(block.block_id for block in blocks)
        self._orders.append(SnapshotOrder(store, request_id, self.bin, num_tokens, ids))

    def take_orders(self) -> list[SnapshotOrder]:
        """The step's orders, at its end; lets go of the blocks that they name."""
        orders, self._orders = self._orders, []
        self.snapshots.release()
        return orders

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The request's blocks; its orders of a step that is still being planned are withdrawn."""
        kept = self._kept.pop(request_id, [])
        answer = self._answers.pop(request_id, None)
        if self._orders:
            self._withdraw(request_id)
        for snapshot in kept if answer is None else [*kept, answer]:
            self.snapshots.refresh(snapshot)
        return super().pop_blocks_for_free(request_id)

    def _withdraw(self, request_id: str) -> None:
        remaining = []
        for order in self._orders:
            if order.request_id != request_id:
                remaining.append(order)
            elif order.store:
                # It will not be written, so nobody may find it.
                self.block_pool.evict_blocks(set(order.blocks))
        self._orders = remaining
