"""A short way through vLLM's coordinator for the steps in which a request needs nothing.

In nearly every decode step a request's next token has a slot already, in every group, and completes
no block. vLLM asks each group's manager all the same: whether blocks are missing, for the new ones,
to drop skipped ones, to cache full ones. With two groups or more that is what a step of many requests
costs above stock's. Here a request's *room* is remembered: up to how many tokens no manager would do
anything. Beyond it vLLM's own way is taken, and the room is found anew from what the managers hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from vllm_duo.kv_cache.manager import RingManager

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.request import Request


def slots(manager: SingleTypeKVCacheManager, request_id: str) -> int:
    """Tokens up to which a request's table in one group needs no more blocks.

    Worked example: sink 64, recent 256, ``P_s`` 128. A ring of 2 blocks has 256 slots; with its third
    and last block it serves any length.
    """
    if isinstance(manager, RingManager):
        return manager.allocator.room(request_id)
    return len(manager.req_to_blocks.get(request_id, ())) * int(manager.block_size)


class SteadyCoordinator(KVCacheCoordinator):
    """Goes before one of vLLM's coordinators (``take_over``), for groups of duo's specs alone."""

    _room: dict[str, int]
    """Per running request, tokens up to which it needs no blocks; requests without are asked for."""
    _uncached: dict[str, int]
    """Per running request, tokens from which on there is a block to be cached."""
    _no_blocks: tuple[list[KVCacheBlock], ...]

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: tuple[Sequence[KVCacheBlock], ...],
        num_encoder_tokens: int,
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """As vLLM's: blocks that the request misses at ``num_tokens`` tokens."""
        if num_tokens <= self._room.get(request_id, 0):
            return 0
        missing: int = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            num_encoder_tokens,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )
        return missing

    def allocate_new_blocks(
        self,
        request_id: str,
        num_tokens: int,
        num_tokens_main_model: int,
        num_encoder_tokens: int = 0,
    ) -> tuple[list[KVCacheBlock], ...]:
        """As vLLM's: gives the request blocks for ``num_tokens`` tokens, returns the new ones."""
        if num_tokens <= self._room.get(request_id, 0):
            return self._no_blocks
        new: tuple[list[KVCacheBlock], ...] = super().allocate_new_blocks(
            request_id, num_tokens, num_tokens_main_model, num_encoder_tokens
        )
        self._room[request_id] = min(
            slots(manager, request_id) for manager in self.single_type_managers
        )
        return new

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """As vLLM's: caches what the request's first ``num_computed_tokens`` tokens complete."""
        request_id = request.request_id
        if num_computed_tokens < self._uncached.get(request_id, 0):
            return
        super().cache_blocks(request, num_computed_tokens)
        self._uncached[request_id] = min(
            (manager.num_cached_block.get(request_id, 0) + 1) * manager.block_size
            for manager in self.single_type_managers
        )

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Nothing: neither full pages nor rings let go of a block before their request ends."""

    def free(self, request_id: str) -> None:
        """As vLLM's: gives all of the request's blocks back."""
        self._forget(request_id)
        super().free(request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As vLLM's: the request's blocks, still to be given back."""
        self._forget(request_id)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks

    def _forget(self, request_id: str) -> None:
        self._room.pop(request_id, None)
        self._uncached.pop(request_id, None)


def take_over(coordinator: KVCacheCoordinator) -> None:
    """Put the short way before a new coordinator, if its groups are full pages and rings.

    Others are left as they are: an unknown manager may have work in a step that needs no blocks, and
    so has vLLM's own where a block is hashed in parts.

    Args:
        coordinator: vLLM's, which holds no request yet; its class changes.
    """
    managers = coordinator.single_type_managers
    known = all(
        type(manager) is FullAttentionManager or isinstance(manager, RingManager)
        for manager in managers
    )
    whole = all(
        manager.block_size == coordinator.block_pool.hash_block_size for manager in managers
    )
    if not known or not whole or not any(isinstance(m, RingManager) for m in managers):
        return
    own = type(coordinator)
    coordinator.__class__ = type(f"Steady{own.__name__}", (SteadyCoordinator, own), {})
    coordinator._room = {}
    coordinator._uncached = {}
    coordinator._no_blocks = tuple([] for _ in managers)
