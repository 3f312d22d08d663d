"""Prefill of the retrieval heads by FlashInfer's paged wrapper, over strided views of our caches.

FlashInfer divides a step's work on the host before its kernel runs (``plan``): from lengths that the
host must know exactly, and for one number of heads. So layers with as many retrieval heads share a
wrapper, and a step is planned once for each such number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches, PagedTable
from vllm_duo.ops.prefill.retrieval import gather_queries, scatter_results

LAYOUT = "HND"
"""FlashInfer's name for caches [blocks, heads, tokens, head size]: ours, as they lie."""

LEAST_WORKSPACE_BYTES = 128 << 20
"""What FlashInfer recommends."""


class Wrapper(Protocol):
    """The part of ``flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper`` that is used."""

    def plan(self, **arguments: Any) -> None:
        """Divide the work of a step."""

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """Attend as planned."""


MakeWrapper = Callable[[torch.Tensor, str], Wrapper]
"""Takes a workspace, [bytes] uint8 on the device, and the layout."""


@dataclass(frozen=True)
class Shape:
    """What layers have in common that share a plan.

    Attributes:
        num_heads: query heads of the retrieval heads.
        num_kv_heads: R.
        head_size: D.
        block_size: P, in tokens.
        dtype: of queries, caches and results.
        scale: factor on the logits.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    scale: float


@dataclass(frozen=True, eq=False)
class Pages:
    """A step's prefills as FlashInfer takes them; b requests, those without a token left out.

    Attributes:
        paged: the table that ``page_indices`` come from.
        query_starts: [b + 1] int32 on the host, first query of each request, from 0.
        page_starts: [b + 1] int32 on the host, first entry of each request in ``page_indices``.
        last_page_lens: [b] int32 on the host, tokens in each request's last page, from 1 to P.
        seq_lens: [b] int32 on the host, tokens of each request with its chunk.
        page_indices: [page_starts[-1]] int32 on the device, blocks of all requests.
    """

    paged: PagedTable
    query_starts: torch.Tensor
    page_starts: torch.Tensor
    last_page_lens: torch.Tensor
    seq_lens: torch.Tensor
    page_indices: torch.Tensor


def plan_pages(batch: Batch, paged: PagedTable) -> Pages:
    """Describe the requests after the first ``num_decodes``, without a look at the device.

    Worked example: blocks of 16 tokens, chunks of 5 and 20 tokens at the end of 5 and 48 tokens:
    query_starts [0, 5, 25], page_starts [0, 1, 4], last_page_lens [5, 16].

    Raises:
        RuntimeError: the host does not know the requests' lengths.
    """
    if not batch.knows_prefill_lens:
        raise RuntimeError(
            "FlashInfer plans from the exact lengths of the requests, and vLLM gave this step none on "
            'the host (seq_lens_cpu_upper_bound): set "retrieval_prefill" to "flash-attn" or "triton"'
        )
    device, size = paged.block_table.device, paged.block_size
    requests = batch.num_decodes + np.flatnonzero(batch.query_lens[batch.num_decodes :])
    lens = batch.host_seq_lens[requests]
    num_pages = -(-lens // size)
    zero = np.zeros(1, dtype=np.int64)

    def on_host(numbers: np.ndarray[Any, Any]) -> torch.Tensor:
        tensor = torch.from_numpy(numbers.astype(np.int32))
        # From pinned memory FlashInfer's copies and ours do not wait for the device.
        return tensor.pin_memory() if device.type == "cuda" else tensor

    query_starts = on_host(np.concatenate([zero, np.cumsum(batch.query_lens[requests])]))
    page_starts = on_host(np.concatenate([zero, np.cumsum(num_pages)]))
    rows = on_host(requests).to(device, non_blocking=True)
    starts = page_starts.to(device, non_blocking=True)
    entries = torch.arange(int(page_starts[-1]), dtype=torch.int32, device=device)
    owners = torch.searchsorted(starts[1:], entries, right=True)
    return Pages(
        paged=paged,
        query_starts=query_starts,
        page_starts=page_starts,
        last_page_lens=on_host(lens - (num_pages - 1) * size),
        seq_lens=on_host(lens),
        page_indices=paged.block_table[rows[owners], entries - starts[owners]],
    )


@dataclass(eq=False)
class _Planned:
    """A wrapper, the step that it is planned for, and the copies of its plan to the device."""

    wrapper: Wrapper
    step: tuple[Batch, PagedTable] | None = None
    uploaded: torch.cuda.Event | None = None


class FlashInferPrefill:
    """A ``gpu.RetrievalPrefill``.

    Args:
        make_wrapper: FlashInfer's ``BatchPrefillWithPagedKVCacheWrapper``.

    Source: the paged call of ``vllm/v1/attention/backends/flashinfer.py``, 0.32.
    """

    def __init__(
        self, make_wrapper: MakeWrapper, workspaces: dict[torch.device, torch.Tensor] | None = None
    ) -> None:
        self._make_wrapper = make_wrapper
        self._planned: dict[tuple[torch.device, Shape], _Planned] = {}
        self._workspaces = {} if workspaces is None else workspaces

    def prepare(self, device: torch.device, shape: Shape) -> None:
        """Reserve memory for layers of a shape, and have FlashInfer compile and load their kernel.

        Without this the first prompt would wait for the compiler.

        Raises:
            RuntimeError: FlashInfer could not.
        """
        if (device, shape) in self._planned:
            return
        token = Batch.from_host([0, 1], [1], 0, device)
        table = torch.zeros((1, 1), dtype=torch.int32, device=device)
        try:
            self._plan(shape, token, PagedTable(table, shape.block_size))
        except Exception as error:
            self._planned.pop((device, shape), None)
            raise RuntimeError(
                f"FlashInfer has no kernel for head size {shape.head_size} and {shape.dtype} here "
                f"({type(error).__name__}: {error}): mend that, or set "
                '"retrieval_prefill" to "flash-attn" or "triton"'
            ) from error

    def __call__(
        self,
        query: torch.Tensor,
        heads: HeadMap,
        caches: LayerCaches,
        batch: Batch,
        scale: float,
        output: torch.Tensor,
    ) -> None:
        """Serve the retrieval heads of all requests after the first ``num_decodes``.

        Args:
            query: [T, Hq, D].
            heads: the layer's head classes.
            caches: read only; the retrieval cache holds the step's own tokens already.
            batch: the step's requests, with exact lengths of the prefills on the host.
            scale: factor on the logits.
            output: [T, Hq, D], mutated in place at these requests' tokens and heads.

        Raises:
            ValueError: FlashInfer cannot read the cache as it lies.
            RuntimeError: the lengths are not known, or a CUDA graph is being captured.
        """
        cache, paged = caches.retrieval, caches.paged
        if cache is None or paged is None or batch.num_tokens == batch.num_decode_tokens:
            return
        _check_cache(cache, query.dtype)
        picked = gather_queries(query, heads, batch)
        shape = Shape(
            num_heads=picked.shape[1],
            num_kv_heads=cache.shape[1],
            head_size=picked.shape[2],
            block_size=paged.block_size,
            dtype=picked.dtype,
            scale=scale,
        )
        wrapper = self._plan(shape, batch, paged)
        keys, values = cache.chunk(2, dim=-1)  # [N, R, P, D], strided
        result = torch.empty_like(picked)
        wrapper.run(picked, (keys, values), out=result)
        scatter_results(result, heads, batch, output)

    def _plan(self, shape: Shape, batch: Batch, paged: PagedTable) -> Wrapper:
        """The shape's wrapper, planned for this step."""
        device = paged.block_table.device
        planned = self._planned.get((device, shape))
        if planned is None:
            planned = _Planned(self._make_wrapper(self._workspace(device, shape), LAYOUT))
            self._planned[device, shape] = planned
        if planned.step is not None and planned.step[0] is batch and planned.step[1] is paged:
            return planned.wrapper
        _refuse_capture(device)
        pages = batch.memo(("flashinfer", id(paged)), lambda: plan_pages(batch, paged))
        # A plan is put together in one buffer on the host, which the device may still be copying for
        # the last step; mostly it has long done so, since the copy precedes that step's attention.
        if planned.uploaded is not None:
            planned.uploaded.synchronize()
        planned.step = None
        planned.wrapper.plan(
            qo_indptr=pages.query_starts,
            paged_kv_indptr=pages.page_starts,
            paged_kv_indices=pages.page_indices,
            paged_kv_last_page_len=pages.last_page_lens,
            num_qo_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim_qk=shape.head_size,
            page_size=shape.block_size,
            causal=True,
            sm_scale=shape.scale,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
            seq_lens=pages.seq_lens,
        )
        planned.uploaded = _record(device)
        planned.step = (batch, paged)
        return planned.wrapper

    def _workspace(self, device: torch.device, shape: Shape) -> torch.Tensor:
        """Space for partial results, [bytes] uint8; layers take turns in it."""
        processors = 0
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        needed = workspace_bytes(processors, shape)
        kept = self._workspaces.get(device)
        if kept is None or len(kept) < needed:
            kept = torch.zeros(needed, dtype=torch.uint8, device=device)
            self._workspaces[device] = kept
        return kept


def workspace_bytes(processors: int, shape: Shape) -> int:
    """Bytes that FlashInfer's plan may ask for partial results; it refuses to plan with fewer.

    It splits long contexts only as far as tiles times KV heads stay within two programs a
    multiprocessor. A tile has 128 query rows at most, each with D + 1 float32 of each query head.
    Worked example: 132 multiprocessors, 4 query heads a KV head, D 128: 66.5 MiB.

    Args:
        processors: multiprocessors of the device.
        shape: of the layers.

    Source: ``PrefillPlan`` in FlashInfer's ``attention/scheduler.cuh``, 0.7.0 and 0.7.2.
    """
    rows = 2 * processors * 128 * (shape.num_heads // shape.num_kv_heads)
    return max(LEAST_WORKSPACE_BYTES, rows * (shape.head_size + 1) * 4 + 64)


def _check_cache(cache: torch.Tensor, dtype: torch.dtype) -> None:
    """Check what FlashInfer's kernels take for granted.

    Raises:
        ValueError: a cache of another type, not contiguous in its last dimension, or with blocks so far
            apart that the distance does not fit in FlashInfer's 32 bits.
    """
    if cache.dtype != dtype or cache.stride(-1) != 1 or cache.stride(0) >= 2**32:
        raise ValueError(
            f"FlashInfer reads caches of the queries' dtype {dtype}, contiguous in their last "
            f"dimension and with blocks less than 2**32 elements apart, got {cache.dtype} with strides "
            f'{cache.stride()}: set "retrieval_prefill" to "flash-attn" or "triton"'
        )


def _refuse_capture(device: torch.device) -> None:
    """Check that no CUDA graph is being captured: it would keep this step's plan for ever.

    Raises:
        RuntimeError: one is.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "FlashInfer cannot plan a prefill while a CUDA graph is being captured: capture decodes "
            'only (cudagraph_mode), or set "retrieval_prefill" to "flash-attn" or "triton"'
        )


def _record(device: torch.device) -> torch.cuda.Event | None:
    """An event behind all that was put on the device so far; None where there is no device."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
