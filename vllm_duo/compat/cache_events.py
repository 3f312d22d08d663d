"""KV cache events: what vLLM tells of a group of streaming heads is what can be resumed at.

Symptom: with ``--kv-events-config`` blocks are told as removed that were never told as stored, and a
hit that is reported again (``kv_cache_report_mode``) names as many blocks of tokens as a snapshot has
pool blocks.
Why: vLLM takes each cached pool block for a block of tokens. See ``kv_cache/snapshot_events.py``.
Condition: the events are on, and the group is one of streaming heads.
May go: once a group's manager makes its own events.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.request import Request


def patch_pool(module: ModuleType) -> None:
    """Wrap ``BlockPool._emit_block_removed_events``.

    Args:
        module: ``vllm.v1.core.block_pool``.
    """
    original = module.BlockPool._emit_block_removed_events

    @wraps(original)
    def _emit_block_removed_events(self: Any, block_hashes: list[Any]) -> None:
        from vllm_duo.kv_cache.snapshot_events import told_removals

        if self.enable_kv_cache_events:
            original(self, told_removals(self, block_hashes))

    module.BlockPool._emit_block_removed_events = _emit_block_removed_events


def patch_coordinator(module: ModuleType) -> None:
    """Wrap ``KVCacheCoordinator.emit_cached_block_events``.

    Args:
        module: ``vllm.v1.core.kv_cache_coordinator``.
    """
    original = module.KVCacheCoordinator.emit_cached_block_events

    @wraps(original)
    def emit_cached_block_events(
        self: Any, request: Request, computed_blocks: tuple[list[Any], ...]
    ) -> None:
        from vllm_duo.kv_cache.snapshot_manager import SnapshotManager

        pages = []
        for manager, blocks in zip(self.single_type_managers, computed_blocks, strict=True):
            snapshot = isinstance(manager, SnapshotManager)
            pages.append([] if snapshot else blocks)
            if snapshot and blocks:
                manager.tell_stored(request, blocks[0].block_hash_num_tokens)
        original(self, request, tuple(pages))

    module.KVCacheCoordinator.emit_cached_block_events = emit_cached_block_events
