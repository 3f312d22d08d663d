"""``DuoStorageConnector``: what vLLM talks to, one object in its scheduler and one in its worker.

Source of the interface: ``vllm/distributed/kv_transfer/kv_connector/v1/base.py``.

A step goes: ``get_num_new_matched_tokens`` reads and checks files as a request is admitted,
``update_state_after_alloc`` says into which blocks they go, ``build_connector_meta`` hands that to the
worker, which copies before the step's forward pass (``start_load_kv``). Snapshots of streaming heads
are known once vLLM has planned the whole step, so ``compat/snapshot_orders.py`` then asks
``plan_saves`` for what is to be stored; the worker copies it after the forward pass
(``wait_for_save``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from vllm_duo.kv_transfer import copier
from vllm_duo.kv_transfer.budget import Budget
from vllm_duo.kv_transfer.identity import ABOUT, identity
from vllm_duo.kv_transfer.orders import Load, StorageMetadata
from vllm_duo.kv_transfer.planner import Planner
from vllm_duo.kv_transfer.pool_shape import PoolShape
from vllm_duo.kv_transfer.settings import StorageSettings
from vllm_duo.kv_transfer.store import Store
from vllm_duo.kv_transfer.writer import Writer
from vllm_duo.logging import get_logger

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

    from vllm_duo.kv_cache.orders import SnapshotOrder

logger = get_logger(__name__)


class DuoStorageConnector(KVConnectorBase_V1, SupportsHMA):
    """Prefixes in files.

    Args:
        vllm_config: the server's.
        role: scheduler or worker.
        kv_cache_config: its caches.
    """

    _cache_hit_source = CacheHitSource.DISK

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        config = vllm_config.kv_transfer_config
        settings = StorageSettings.read(config.kv_connector_extra_config)
        self._shape = PoolShape.of(kv_cache_config)
        self._settings = settings
        self._loads: list[Load] = []
        self._is_retired = False
        self._planner: Planner | None = None
        self._writer: Writer | None = None
        self._pool: npt.NDArray[np.uint8] | None = None
        if role is KVConnectorRole.SCHEDULER:
            server, about = identity(vllm_config, kv_cache_config, settings.path)
            self._store = Store(settings.path, server)
            self._planner = Planner(self._store, self._shape)
            with suppress(OSError):  # for people alone; the writer tells of a full disk
                self._store.folder.mkdir(parents=True, exist_ok=True)
                (self._store.folder / ABOUT).write_text(about)
            logger.info(
                "duo: prefixes are kept in %s, at most %d bytes",
                self._store.folder,
                settings.max_bytes,
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """What is not stored is computed again."""
        return False

    # The scheduler's side.

    @property
    def _plans(self) -> Planner:
        assert self._planner is not None, "the worker's side plans nothing"
        return self._planner

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        """Remember vLLM's manager, whose pool has the snapshots."""
        self._plans.manager = kv_cache_manager

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Tokens of a stored prefix beyond the pool's; the worker has them before the forward pass."""
        if self._is_retired:
            return 0, False
        return self._plans.match(request, num_computed_tokens), False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Order what was read into the blocks that the request was given."""
        self._loads += self._plans.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StorageMetadata:
        """The step's loads."""
        loads, self._loads = self._loads, []
        return StorageMetadata(self._store.server, loads)

    def plan_saves(
        self,
        scheduler_output: SchedulerOutput,
        requests: dict[str, Request],
        orders: Sequence[SnapshotOrder],
    ) -> None:
        """Add to a planned step what it makes possible to store.

        Args:
            scheduler_output: vLLM's, with the metadata of ``build_connector_meta``.
            requests: vLLM's, by id.
            orders: the step's snapshots.
        """
        if self._is_retired:
            return
        if self._shape.rings:
            stored = {(each.request_id, each.num_tokens): None for each in orders if each.store}
            boundaries = [(requests[request_id], end) for request_id, end in sorted(stored)]
        else:
            scheduled = (requests[each] for each in scheduler_output.num_scheduled_tokens)
            boundaries = self._plans.boundaries(scheduled)
        metadata = scheduler_output.kv_connector_metadata
        assert isinstance(metadata, StorageMetadata)
        metadata.saves += self._plans.saves(boundaries)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks can go: what is stored of it was copied as it was computed."""
        self._plans.forget(request.request_id)
        return False, None

    def reset_cache(self) -> bool:
        """Remove what this server, and all that compute the same, have stored; False if that failed."""
        try:
            self._plans.reset()
        except OSError as error:
            logger.warning("duo: not everything was removed from %s: %s", self._store.folder, error)
            return False
        return True

    def weights_changed(self) -> None:
        """What is stored belongs to other weights from now on: neither load nor store."""
        if not self._is_retired:
            self._is_retired = True
            logger.warning(
                "duo: the weights were loaded again: no prefix is stored or loaded any more until "
                "this server is started again"
            )

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the pool behind the layers' caches."""
        self._pool = copier.pool_of(kv_caches, self._shape)

    def _metadata(self) -> StorageMetadata:
        metadata: KVConnectorMetadata = self._get_connector_metadata()
        assert isinstance(metadata, StorageMetadata)
        return metadata

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Copy the step's loads into the pool."""
        if loads := self._metadata().loads:
            assert self._pool is not None
            copier.load(self._pool, loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for."""

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        """Nothing: all layers of a block are copied together."""

    def wait_for_save(self) -> None:
        """Copy what the step has computed, unless its forward pass has failed."""
        metadata = self._metadata()
        if metadata.saves and sys.exc_info()[0] is None:
            assert self._pool is not None
            if self._writer is None:
                path, max_bytes = self._settings.path, self._settings.max_bytes
                self._writer = Writer(Store(path, metadata.server), Budget(path, max_bytes))
            copier.save(self._pool, metadata.saves, self._writer)

    def shutdown(self) -> None:
        """Write what waits to be written."""
        if self._writer is not None:
            self._writer.close()
