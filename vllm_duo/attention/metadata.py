"""Per-step metadata: the step's batch, shared by all layers, and one block table per group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionMetadata, AttentionMetadataBuilder

from vllm_duo.kv_cache.orders import SnapshotOrder
from vllm_duo.kv_cache.spec import StreamingSpec
from vllm_duo.ops.batch import Batch, PagedTable, RingTable, SnapshotCopy

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.kv_cache_interface import AttentionSpec


@dataclass(frozen=True, eq=False)
class DuoMetadata(AttentionMetadata):
    """What one cache group's layers need in a step.

    Attributes:
        batch: the step's requests; the same object for every group of the step.
        table: the group's block table, by its class.
    """

    batch: Batch
    table: PagedTable | RingTable


class DuoMetadataBuilder(AttentionMetadataBuilder[DuoMetadata]):
    """Builds ``DuoMetadata``; one instance per group and spec, sharing the step's work.

    vLLM moves decodes (one query token) to the front of the batch for us.
    """

    reorder_batch_threshold: int | None = 1

    # The last step's batch and tables. vLLM makes new views of its buffers for each step and one
    # metadata object for each group, so the identity of these objects (held here, so that their ids
    # are not reused) tells steps and groups apart.
    _step: ClassVar[tuple[torch.Tensor | None, Batch | None]] = (None, None)
    _group: ClassVar[tuple[CommonAttentionMetadata | None, PagedTable | RingTable | None]] = (
        None,
        None,
    )

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DuoMetadata:
        """Build one group's metadata from the step's common metadata."""
        common = common_attn_metadata
        cls = DuoMetadataBuilder
        start, batch = cls._step
        if start is not common.query_start_loc_cpu or batch is None:
            batch = make_batch(common)
            cls._step = (common.query_start_loc_cpu, batch)
        group, table = cls._group
        if group is not common or table is None:
            table = self._make_table(common)
            cls._group = (common, table)
        return DuoMetadata(batch, table)

    def _make_table(self, common: CommonAttentionMetadata) -> PagedTable | RingTable:
        spec = self.kv_cache_spec
        if isinstance(spec, StreamingSpec):
            return RingTable(
                common.block_table_tensor,
                spec.slots_per_block,
                spec.sink_size,
                spec.recent_size,
                spec.span.ring_size,
                _copies(spec.bin, self.device),
            )
        return PagedTable(common.block_table_tensor, spec.block_size)


@dataclass(frozen=True)
class _Step:
    """Snapshot orders of the step being run, and the batch's rows once they are known."""

    orders: Sequence[SnapshotOrder]
    rows: Callable[[], Mapping[str, int]]


_step: _Step | None = None


@contextmanager
def step_orders(
    orders: Sequence[SnapshotOrder], rows: Callable[[], Mapping[str, int]]
) -> Iterator[None]:
    """Run a step that carries snapshot orders.

    Args:
        orders: of the step, in the scheduler's order.
        rows: gives the batch's row of each request once the batch is made.
    """
    global _step
    _step = _Step(orders, rows)
    try:
        yield
    finally:
        _step = None


def _copies(bin: int, device: torch.device) -> tuple[SnapshotCopy, ...]:
    """The step's copies in one bin.

    Raises:
        RuntimeError: an order names a request that is not in the batch.
    """
    if _step is None:
        return ()
    rows = _step.rows()
    copies = []
    for order in _step.orders:
        if order.bin != bin:
            continue
        row = rows.get(order.request_id)
        if row is None:
            raise RuntimeError(
                f"a snapshot order names request {order.request_id}, which is not in the batch; this "
                "is a defect of vllm-duo, please report it with the server's flags"
            )
        blocks = torch.tensor(order.blocks, dtype=torch.int64, device=device)
        copies.append(SnapshotCopy(order.store, row, order.num_tokens, blocks))
    return tuple(copies)


def make_batch(common: CommonAttentionMetadata) -> Batch:
    """The step's requests, from vLLM's metadata.

    Decodes are the leading requests with one query token. A prefill's last chunk may have one token
    too; vLLM leaves it among the prefills, and ``prefill`` serves it like any other chunk.

    Raises:
        NotImplementedError: the attention is not causal.
    """
    if common.causal is not True:
        raise NotImplementedError("--attention-backend duo serves causal attention only")
    start = common.query_start_loc_cpu.numpy().astype(np.int64)
    seq_lens = common.seq_lens.numpy().astype(np.int64)
    query_lens = np.diff(start)
    longer = np.flatnonzero(query_lens > 1)
    num_decodes = int(longer[0]) if len(longer) else len(query_lens)
    return Batch(common.query_start_loc, common.seq_lens, num_decodes, start, seq_lens)
