"""The compiled CPU kernels behind every operator, and the choice between them and the references.

Tensors on the CPU run the kernels of ``csrc/``, those on another device the PyTorch references.
``VLLM_DUO_OPS=reference`` selects the references everywhere, ``VLLM_DUO_CPU_ISA`` a lesser variant of
the kernels. Nothing falls back by itself: a missing compiled module is an error on import, unless the
references were selected.
"""

from __future__ import annotations

import os

import torch

from vllm_duo.kv_cache.formats import CacheFormat
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches, PagedTable, RingTable
from vllm_duo.ops.validate import FULL_CHECKS

use_reference = os.environ.get("VLLM_DUO_OPS", "kernels") == "reference"
"""Whether CPU tensors run the references too; read at import, and set by tests."""


class _Missing:
    """Stands for the compiled module where it is missing and the references were selected."""

    def __init__(self, problem: str) -> None:
        self.problem = problem

    def __getattr__(self, name: str) -> int:
        """Codes of phases and dtypes mean nothing without the kernels.

        Raises:
            ImportError: a kernel is to run.
        """
        if name.isupper():
            return 0
        raise ImportError(self.problem)


try:
    from vllm_duo import _cpu
except ImportError as error:
    problem = (
        "vllm-duo's compiled kernels (vllm_duo._cpu) are missing or do not load "
        f"({error}): install the package again (pip install vllm-duo, or make setup in a checkout)"
    )
    if not use_reference:
        raise ImportError(problem) from error
    _cpu = _Missing(problem)  # type: ignore[assignment]

WRITE_RETRIEVAL: int = _cpu.WRITE_RETRIEVAL
COPY_SNAPSHOTS: int = _cpu.COPY_SNAPSHOTS
ATTEND: int = _cpu.ATTEND
WRITE_STREAMING: int = _cpu.WRITE_STREAMING

_DTYPES = {
    torch.float32: _cpu.FLOAT32,
    torch.bfloat16: _cpu.BFLOAT16,
    torch.float16: _cpu.FLOAT16,
}

_FORMATS = {
    ("e4m3", False): _cpu.FP8_E4M3,
    ("e5m2", False): _cpu.FP8_E5M2,
    ("e4m3", True): _cpu.SCALED_FP8_E4M3,
    ("int8", True): _cpu.SCALED_INT8,
    ("int4", True): _cpu.SCALED_INT4,
}


def runs(tensor: torch.Tensor) -> bool:
    """Whether the compiled kernels serve this tensor."""
    return tensor.is_cpu and not use_reference


def run(
    phases: int,
    query: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
    *,
    scale: float = 1.0,
    output: torch.Tensor | None = None,
    requests: tuple[int, int] = (0, 0),
    sinks: torch.Tensor | None = None,
) -> None:
    """Run some phases of a layer's step in one call, in the order in which they must run.

    Args:
        phases: sum of ``WRITE_RETRIEVAL``, ``COPY_SNAPSHOTS``, ``ATTEND`` and ``WRITE_STREAMING``.
        query: [T, Hq, D] fp32/bf16/fp16; None without ``ATTEND``.
        key: [T, Hkv, D] of the query's dtype.
        value: [T, Hkv, D] of the query's dtype.
        heads: the layer's head classes.
        caches: mutated in place by the writing phases.
        batch: the step's requests.
        scale: factor on the logits.
        output: [T, Hq, D], mutated in place; None without ``ATTEND``.
        requests: first and one past the last request that attends.
        sinks: [Hq] float32, learned logits without a value; None: there are none.

    Raises:
        ValueError: shapes, dtypes, strides or tables disagree.
    """
    native_heads = heads.memo(
        "native", lambda: _cpu.Heads(heads.retrieval.tolist(), heads.streaming.tolist())
    )
    native_batch = batch.memo(
        "native",
        lambda: _cpu.Batch(batch.host_query_start_loc.tolist(), batch.host_seq_lens.tolist()),
    )
    paged, ring = caches.paged, caches.ring
    _cpu.run(
        phases,
        native_batch,
        native_heads,
        None if query is None else _view("query", query),
        _view("key", key),
        _view("value", value),
        None if output is None else _view("output", output),
        scale,
        *requests,
        None
        if caches.retrieval is None
        else _cache("retrieval cache", caches.retrieval, caches.form),
        None if paged is None else batch.memo(("native", paged), lambda: _paged_table(paged)),
        None
        if caches.streaming is None
        else _cache("streaming cache", caches.streaming, caches.streaming_form),
        None if ring is None else batch.memo(("native", ring), lambda: _ring_table(ring)),
        None
        if ring is None or not ring.copies
        else batch.memo(("copies", ring), lambda: _copies(ring)),
        caches.key_scale,
        caches.value_scale,
        None if sinks is None else _view("sinks", sinks),
        FULL_CHECKS,
    )


def describe() -> str:
    """The variant of the kernels and the threads, for people."""
    if use_reference:
        return "PyTorch references (VLLM_DUO_OPS=reference)"
    library = os.path.basename(_cpu.openmp_library()) or "no OpenMP runtime"
    return f"CPU kernels {_cpu.isa()}, {_cpu.max_threads()} threads of {library}"


def supported_isas() -> list[str]:
    """Variants of the kernels that run on this machine, least demanding first."""
    names: list[str] = _cpu.supported_isas()
    return names


def force_isa(name: str) -> None:
    """Run another variant from now on; for tests and benchmarks.

    Raises:
        RuntimeError: the variant is unknown or this machine lacks its instructions.
    """
    _cpu.force_isa(name)


def isa() -> str:
    """Name of the variant that runs."""
    name: str = _cpu.isa()
    return name


def _view(name: str, tensor: torch.Tensor) -> _cpu.View:
    """Address, dtype, shape and strides: what the kernels need to know of a tensor."""
    return tensor.data_ptr(), _dtype(name, tensor), tensor.shape, tensor.stride()


def _cache(name: str, tensor: torch.Tensor, form: CacheFormat | None) -> _cpu.View:
    """The same of a cache, whose bytes may mean other numbers than its dtype says."""
    if form is None:
        return _view(name, tensor)
    if tensor.dtype not in (torch.uint8, torch.int8) or not tensor.is_cpu:
        raise ValueError(
            f"a quantised {name} must be uint8 or int8 on the CPU, got {tensor.dtype} on "
            f"{tensor.device}"
        )
    code = _FORMATS[form.number, form.token_scales]
    return tensor.data_ptr(), code, tensor.shape, tensor.stride()


def _dtype(name: str, tensor: torch.Tensor) -> int:
    dtype: int | None = _DTYPES.get(tensor.dtype)
    if dtype is None or not tensor.is_cpu:
        raise ValueError(
            f"{name} must be float32, bfloat16 or float16 on the CPU for the CPU kernels, got "
            f"{tensor.dtype} on {tensor.device}: set VLLM_DUO_OPS=reference for other dtypes"
        )
    return dtype


def _paged_table(table: PagedTable) -> _cpu.BlockTable:
    return _cpu.BlockTable(table.block_table, table.block_size, False, 0, 0, 0)


def _ring_table(table: RingTable) -> _cpu.BlockTable:
    return _cpu.BlockTable(
        table.block_table,
        table.block_size,
        True,
        table.sink_size,
        table.recent_size,
        table.ring_size,
    )


def _copies(ring: RingTable) -> _cpu.Copies:
    copies = _cpu.Copies()
    for copy in ring.copies:
        copies.add(copy.store, copy.row, copy.num_tokens, copy.blocks)
    return copies
