"""The ring manager of a server with prefix caching: rings, and snapshots of them for later hits.

A request holds its ring and no more, as without prefix caching. What later requests resume at are
*snapshots*: copies of the streaming state at block boundaries (``snapshot_policy.py`` says at which),
free blocks with a hash.

Prefix caching never delays or preempts a running request. A snapshot is stored at once, so that
others may resume at it in the same step, if it leaves all blocks that the step's running requests
could need; else at the end of the step, from what is left. And where the pool is too short for a
copy, a request takes over the blocks of the snapshot that it resumes at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from vllm.v1.core.kv_cache_utils import resolve_block_hashes

from vllm_duo.kv_cache.manager import RingManager
from vllm_duo.kv_cache.orders import SnapshotOrder
from vllm_duo.kv_cache.rounding import cdiv
from vllm_duo.kv_cache.snapshot_events import mark_group, tell_stored
from vllm_duo.kv_cache.snapshot_policy import Reason, SnapshotPolicy
from vllm_duo.kv_cache.snapshots import Snapshot, SnapshotPool, find_snapshot

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.request import Request

    from vllm_duo.kv_cache.allocator import RingAllocator
    from vllm_duo.kv_cache.spec import StreamingSpec

ANSWER_INTERVAL = 64
"""Tokens between the snapshots of an answer, rounded up to whole blocks."""


RINGS = "duo_rings"
"""Attribute of vLLM's ``BlockPool``: the ring allocators that share it, one of each bin."""


def join_rings(pool: BlockPool, allocator: RingAllocator) -> list[RingAllocator]:
    """Add a bin's allocator to those of the pool; the list grows until all managers are made."""
    rings: list[RingAllocator] = getattr(pool, RINGS, [])
    setattr(pool, RINGS, rings)
    rings.append(allocator)
    return rings


class SnapshotManager(RingManager):
    """Streaming blocks of one bin, with snapshots for prefix hits."""

    def __init__(self, kv_cache_spec: StreamingSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        spec = kv_cache_spec
        self.span = spec.span
        self.snapshots = SnapshotPool(self.block_pool, self.kv_cache_group_id)
        mark_group(self.block_pool, self.kv_cache_group_id)
        self.policy = SnapshotPolicy(self.block_size, spec.snapshot_interval, ANSWER_INTERVAL)
        self.bin = spec.bin
        # Blocks that the running requests of a step may still claim: one for each started block of
        # its tokens, one more a request and those for its draft model, and what their rings miss (in
        # every bin: bins of layers with a window of their own have other rings).
        self._step_blocks = cdiv(spec.max_step_tokens, self.block_size)
        self._request_blocks = 1 + cdiv(spec.lookahead_size, self.block_size)
        self._rings = join_rings(self.block_pool, self.allocator)
        self._orders: list[SnapshotOrder] = []
        self._late: list[tuple[Request, int, Reason]] = []
        # By request: the snapshots that it has resumed at and stored, ascending.
        self._trails: dict[str, list[Snapshot]] = {}
        # By request of which a KV connector fills the ring in this step: tokens of that state.
        self._filled: dict[str, int] = {}
        # Tokens that the request being admitted will have after the step.
        self._admitted_tokens = 0
        self._in_step = True
        self._num_hits = self._num_hit_tokens = self._num_stored = 0

    @property
    def counts(self) -> tuple[int, int, int]:
        """Requests that resumed at a snapshot, their tokens, and snapshots stored, all so far."""
        return self._num_hits, self._num_hit_tokens, self._num_stored

    @property
    def _kept_of_answer(self) -> int:
        """Snapshots of an answer that are kept, its last ones.

        The next turn resumes at the last block boundary of the answer, for an EAGLE head one block
        earlier (vLLM's ``use_eagle``): then the last snapshot may lie too far on, the one before not.
        """
        return 2 if self.use_eagle else 1

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
        if drop_eagle_block:
            # An EAGLE head's key depends on the token after it, so of a hit's pages the last one, which
            # may be followed by another token, is dropped; vLLM asks for a block more than it wants.
            # Streaming heads have no such keys: their state at the end of what remains is whole.
            max_length -= spec.block_size
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

    def new_step_starts(self) -> None:
        """A step is being planned, until ``take_orders``."""
        self._in_step = True

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
        """Blocks that the next claim takes at least: a hit's idle blocks can become the ring's own.

        Where a KV connector brings the state of a longer prefix, the hit's is of no use.
        """
        missing = self.allocator.missing_blocks(request_id, num_tokens)
        if not new_computed_blocks or total_computed_tokens > num_local_computed_tokens:
            return missing
        self._admitted_tokens = num_tokens
        idle: int = self._get_num_evictable_blocks(new_computed_blocks)
        return missing if idle == len(new_computed_blocks) else missing + idle

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Order the hit's state to be copied into the request's ring, or make its blocks the ring."""
        if num_external_computed_tokens > 0:
            # The connector fills the ring with the state of the whole prefix.
            num_tokens = num_local_computed_tokens + num_external_computed_tokens
            self.num_cached_block[request_id] = num_tokens // self.block_size
            self._filled[request_id] = num_tokens
            return
        self.num_cached_block[request_id] = num_local_computed_tokens // self.block_size
        if not new_computed_blocks:
            if num_local_computed_tokens > 0:
                self._refuse_hits(request_id, (), num_local_computed_tokens)
            return
        self._num_hits += 1
        self._num_hit_tokens += num_local_computed_tokens
        if self._is_short_for_copy(request_id, new_computed_blocks, num_local_computed_tokens):
            self.block_pool.touch(new_computed_blocks)
            self.snapshots.forget(new_computed_blocks)
            self.allocator.adopt(request_id, new_computed_blocks)
            return
        snapshot = self.snapshots.known(new_computed_blocks, num_local_computed_tokens)
        snapshot.hits += 1
        self.snapshots.hold(new_computed_blocks)
        self._trail(request_id).append(snapshot)
        self._order(False, request_id, num_local_computed_tokens, new_computed_blocks)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """Nothing yet: ``allocate_new_blocks`` claims the ring, and the connector fills it."""

    def _is_short_for_copy(
        self, request_id: str, blocks: Sequence[KVCacheBlock], num_tokens: int
    ) -> bool:
        """Whether a copy would take blocks that the request itself still needs in this step."""
        idle: int = self._get_num_evictable_blocks(blocks)
        if idle < len(blocks):
            return False
        pages = cdiv(self._admitted_tokens - num_tokens, self.block_size)
        rings = sum(ring.missing_blocks(request_id, self._admitted_tokens) for ring in self._rings)
        return bool(self.block_pool.get_num_free_blocks() < idle + pages + rings)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Order the snapshots that this step's tokens pass.

        With async scheduling vLLM also calls it as tokens become known, between two steps: no order
        could be carried out then, so their boundary waits for the request's next step.

        With speculative decoding ``num_tokens`` counts no draft. Drafts become known one step after
        they were computed, so a boundary among those that were accepted lies before this step's
        tokens. All that a query there sees is in the ring still. Say the step before began at c and
        wrote k drafts, up to c + k: overwritten are positions up to c + k - recent - drafts, so up to
        c - recent. A boundary that was not known then is c + 2 at least and sees from
        c + 3 - recent on.

        Args:
            request: the request.
            num_tokens: its known tokens after the step, those already cached included.
            retention_interval: vLLM's own, for its own specs; not used.
            replay_boundaries: where vLLM expects the prompt to be resumed.
        """
        size = self.block_size
        self._store_filled(request)
        done = self.num_cached_block.get(request.request_id, 0)
        num_blocks = num_tokens // size
        if num_blocks <= done or not self._in_step:
            return
        self.num_cached_block[request.request_id] = num_blocks
        points = self.policy.boundaries(
            done * size, num_blocks * size, replay_boundaries, request.shared_prefix_boundary
        )
        for boundary, reason in points:
            # The ring no longer has an earlier state than that before the drafts of the last step.
            if boundary >= request.num_computed_tokens - self.span.draft_size and not self._store(
                request, boundary, reason, self._reserve()
            ):
                self._late.append((request, boundary, reason))

    def _store_filled(self, request: Request) -> None:
        """Order a snapshot of the state that a KV connector brings: others may resume at it, too.

        It is copied before the step's attention and after the connector has filled the ring.
        """
        boundary = self._filled.pop(request.request_id, None)
        if boundary is not None and not self._store(
            request, boundary, Reason.PROMPT, self._reserve()
        ):
            self._late.append((request, boundary, Reason.PROMPT))

    def _store(self, request: Request, boundary: int, reason: Reason, reserve: int) -> bool:
        """Order one snapshot; False if that would not leave ``reserve`` free blocks."""
        request_id = request.request_id
        hashes = resolve_block_hashes(
            request.block_hashes, self.block_pool.hash_block_size, self.block_size
        )
        prefix = hashes[boundary // self.block_size - 1]
        size = self.span.blocks(boundary)
        if self.snapshots.find(prefix, size) is not None:
            return True
        blocks = self._replaced_blocks(request_id, size) if reason is Reason.ANSWER else None
        if blocks is None:
            blocks = self.snapshots.claim(size, reserve)
        if blocks is None:
            return False
        snapshot = self.snapshots.publish(blocks, prefix, boundary, reason)
        self._num_stored += 1
        self.tell_stored(request, boundary)
        self._order(True, request_id, boundary, blocks)
        if reason is not Reason.INTERVAL:
            self._trail(request_id).append(snapshot)
        return True

    def tell_stored(self, request: Request, boundary: int) -> None:
        """Tell the consumers of KV cache events that the boundary can be resumed at."""
        tell_stored(self.block_pool, request, boundary, self.block_size, self.kv_cache_group_id)

    def _replaced_blocks(self, request_id: str, size: int) -> Sequence[KVCacheBlock] | None:
        """The blocks of an answer's snapshot that is no longer needed, if still there and unused."""
        trail, kept = self._trail(request_id), self._kept_of_answer
        before = trail[-kept] if len(trail) >= kept else None
        if before is None or before.reason is not Reason.ANSWER or before.hits:
            return None
        if len(before.blocks) != size or not before.is_whole() or not before.is_idle():
            return None
        trail.pop(-kept)
        self.snapshots.hold(before.blocks)
        self.snapshots.forget(before.blocks)
        return before.blocks

    def _trail(self, request_id: str) -> list[Snapshot]:
        """What the request has resumed at and stored, ascending."""
        return self._trails.setdefault(request_id, [])

    def _reserve(self) -> int:
        """Free blocks that the step's running requests may still need, at most."""
        rings = sum(ring.growing_blocks() for ring in self._rings)
        return self._step_blocks + len(self.allocator.tables) * self._request_blocks + rings

    def _order(
        self, store: bool, request_id: str, num_tokens: int, blocks: Sequence[KVCacheBlock]
    ) -> None:
        ids = tuple(block.block_id for block in blocks)
        self._orders.append(SnapshotOrder(store, request_id, self.bin, num_tokens, ids))

    def store_late(self) -> None:
        """At the end of a step: store from what it left free the snapshots that had to wait."""
        late, self._late = self._late, []
        for request, boundary, reason in late:
            if request.request_id in self.allocator.tables:
                self._store(request, boundary, reason, 0)

    def take_orders(self) -> list[SnapshotOrder]:
        """The step's orders, after ``store_late`` of all bins; lets go of the blocks they name."""
        orders, self._orders = self._orders, []
        self.snapshots.release()
        self._in_step = False
        return orders

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The request's blocks; its orders of a step that is still being planned are withdrawn."""
        trail = self._trails.pop(request_id, [])
        self._filled.pop(request_id, None)
        if self._orders:
            self._withdraw(request_id)
        whole = [snapshot for snapshot in trail if snapshot.is_whole()]
        last = whole[-self._kept_of_answer :]
        for snapshot in whole:
            if snapshot.reason.one_chat and snapshot.hits <= 1 and snapshot not in last:
                # The chat's next turn resumes further on.
                self.snapshots.retire(snapshot)
            else:
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
