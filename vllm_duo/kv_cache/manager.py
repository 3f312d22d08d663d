"""vLLM's manager interface over the ring allocator, without and with prefix caching.

Source: ``vllm/v1/core/single_type_kv_cache_manager.py``, nearest relative ``CircularBufferManager``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

from vllm_duo.kv_cache.allocator import RingAllocator

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
    from vllm.v1.kv_cache_interface import KVCacheSpec
    from vllm.v1.request import Request

    from vllm_duo.kv_cache.spec import StreamingSpec


class RingManager(SingleTypeKVCacheManager):
    """Streaming blocks of one bin: a ring per request, overwritten in place.

    A ring cannot serve prefix hits: its blocks are overwritten. The manager therefore takes part in
    vLLM's hit search and answers 0 tokens. (A spec with ``prefix_cacheable = False`` would be left
    out of the search instead, and vLLM would resume at tokens that the ring never held.) With vLLM's
    prefix caching on, the class makes a ``SnapshotManager`` instead.
    """

    def __new__(cls, kv_cache_spec: StreamingSpec, **kwargs: Any) -> RingManager:
        """The manager that vLLM's ``--enable-prefix-caching`` asks for."""
        if cls is RingManager and kwargs.get("enable_caching"):
            from vllm_duo.kv_cache.snapshot_manager import SnapshotManager

            return super().__new__(SnapshotManager)
        return super().__new__(cls)

    def __init__(self, kv_cache_spec: StreamingSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.allocator = RingAllocator(kv_cache_spec.span, self.block_pool)
        # vLLM's coordinator reads the tables under this name.
        self.req_to_blocks = self.allocator.tables

    @property
    def has_positionally_stable_blocks(self) -> bool:
        """Table entries are reused for later positions."""
        return False

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
        """Blocks that the next claim takes; the ring is constant, so no admission cap is needed."""
        self._refuse_hits(request_id, new_computed_blocks, num_local_computed_tokens)
        return self.allocator.missing_blocks(request_id, num_tokens)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Claim what ``num_tokens`` tokens need; returns the new blocks in table order."""
        return self.allocator.claim(request_id, num_tokens)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Nothing to add: there are no hits."""
        self._refuse_hits(request_id, new_computed_blocks, num_external_computed_tokens)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """A KV connector needs snapshots; refused at start without, so this is a broken state."""
        self._refuse_hits(request_id, (), num_external_computed_tokens)

    def _refuse_hits(
        self, request_id: str, blocks: Sequence[KVCacheBlock], num_tokens: int
    ) -> None:
        new = request_id not in self.allocator.tables
        if len(blocks) > 0 or (new and num_tokens > 0):
            raise RuntimeError(
                f"request {request_id} was to resume at a prefix that the streaming ring does not "
                "hold; this is a defect of vllm-duo, please report it with the server's flags"
            )

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
        """No hit, for every group."""
        return tuple([] for _ in kv_cache_group_ids), 0

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Ring blocks get no hash: they are overwritten."""

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """No block ever leaves a ring before its request does."""

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """The request's blocks, which the caller gives back to the pool."""
        self.num_cached_block.pop(request_id, None)
        return self.allocator.pop(request_id)
