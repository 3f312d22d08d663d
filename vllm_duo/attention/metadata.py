"""Per-step metadata: the step's batch, shared by all layers, and one block table per group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
)

from vllm_duo.attention.snapshot_buffer import ORDERS_PER_REQUEST, SnapshotBuffer
from vllm_duo.kv_cache.orders import SnapshotOrder
from vllm_duo.kv_cache.spec import StreamingSpec
from vllm_duo.ops import gpu
from vllm_duo.ops.batch import Batch, IntArray, PagedTable, RingTable, SnapshotCopy

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

    vLLM moves decodes (one query token, and its drafts) to the front of the batch for us.

    On a GPU the operators read vLLM's own device buffers, which keep their place from step to step,
    and everything else that they need is known on the host: so the metadata of a batch of decodes can
    be captured in a CUDA graph as it is, padding included.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
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
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self._orders: SnapshotBuffer | None = None
        if device.type == "cuda":
            self._prepare_gpu()

    def _prepare_gpu(self) -> None:
        """Allocate before anything is captured: the decode workspace, the buffer of copies."""
        config, spec = self.vllm_config, self.kv_cache_spec
        model, parallel = config.model_config, config.parallel_config
        group = model.get_num_attention_heads(parallel) // model.get_num_kv_heads(parallel)
        gpu.reserve(self.device, self._decode_threshold, group, spec.head_size)
        if isinstance(spec, StreamingSpec) and config.cache_config.enable_prefix_caching:
            most = ORDERS_PER_REQUEST * config.scheduler_config.max_num_seqs
            self._orders = SnapshotBuffer.allocate(most, spec.span.max_blocks, self.device)

    @property
    def _decode_threshold(self) -> int:
        """Longest query that ``decode`` serves, in tokens."""
        return min(self.reorder_batch_threshold or 1, gpu.MAX_DECODE_QUERY)

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
            batch = make_batch(common, self._decode_threshold)
            cls._step = (common.query_start_loc_cpu, batch)
        group, table = cls._group
        if group is not common or table is None:
            table = self._make_table(common)
            cls._group = (common, table)
        return DuoMetadata(batch, table)

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> DuoMetadata:
        """Build the metadata of a draft model or an EAGLE head for one of its passes.

        From pass to pass vLLM changes the same object in place, so nothing is shared.
        """
        batch = make_batch(common_attn_metadata, self._decode_threshold)
        return DuoMetadata(batch, self._make_table(common_attn_metadata))

    def _make_table(self, common: CommonAttentionMetadata) -> PagedTable | RingTable:
        spec = self.kv_cache_spec
        if isinstance(spec, StreamingSpec):
            return RingTable(
                common.block_table_tensor,
                spec.slots_per_block,
                spec.sink_size,
                spec.recent_size,
                spec.span.ring_size,
                *self._step_copies(spec.bin),
            )
        return PagedTable(common.block_table_tensor, spec.block_size)

    def _step_copies(self, bin: int) -> tuple[tuple[SnapshotCopy, ...], torch.Tensor | None]:
        """The step's copies in one bin: as they are, or on a GPU in the buffer."""
        if self._orders is None:
            return _copies(bin, self.device), None
        return (), self._orders.fill(_copies(bin, torch.device("cpu")))


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


def make_batch(common: CommonAttentionMetadata, longest_decode: int = 1) -> Batch:
    """The step's requests, from vLLM's metadata.

    Decodes are the leading requests with few query tokens, and the padding of a captured batch with
    none. A prefill's last chunk may have one token too; where vLLM leaves it among the prefills,
    ``prefill`` serves it like any other chunk.

    Args:
        common: on a GPU the lengths on the host are upper bounds, enough for planning.
        longest_decode: query tokens of a decode at most.

    Raises:
        NotImplementedError: the attention is not causal.
    """
    if common.causal is not True:
        raise NotImplementedError("--attention-backend duo serves causal attention only")
    start = common.query_start_loc_cpu.numpy().astype(np.int64)
    query_lens = np.diff(start)
    longer = np.flatnonzero(query_lens > longest_decode)
    num_decodes = int(longer[0]) if len(longer) else len(query_lens)
    lens, exact = _host_lens(common)
    return Batch(common.query_start_loc, common.seq_lens, num_decodes, start, lens, exact)


def _host_lens(common: CommonAttentionMetadata) -> tuple[IntArray, bool]:
    """[B] tokens of each request, or on a GPU an upper bound: reading them would wait for it.

    The second is whether they are exact for prefills, as vLLM says of its own upper bounds.
    """
    if common.seq_lens.is_cpu:
        return common.seq_lens.numpy().astype(np.int64), True
    bound = common.seq_lens_cpu_upper_bound
    if bound is None:
        return np.full(len(common.seq_lens), common.max_seq_len, dtype=np.int64), False
    return bound.numpy().astype(np.int64), True
