"""The operators, as this machine runs them, against the rule as a mask in plain float64.

Requests of random tensors are served as a server would: chunks of a prompt, then tokens one by one, two
requests in a batch, and a third that resumes at a snapshot. Unused slots hold NaN, so that reading one
shows. Where the compiled kernels run, also with quantised retrieval heads beside streaming heads that
keep the model's dtype. Some seconds at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from vllm_duo.kv_cache.formats import FORMATS, CacheFormat
from vllm_duo.ops import cpu
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches, PagedTable, RingTable, SnapshotCopy
from vllm_duo.ops.decode import decode
from vllm_duo.ops.prefill import prefill
from vllm_duo.ops.quantise import dequantise, quantise
from vllm_duo.ops.snapshot import copy_snapshots
from vllm_duo.ops.write_kv import write_retrieval, write_streaming

RETRIEVAL = (True, False, False, True)
GROUP = 4
SINK_SIZE = 5
RECENT_SIZE = 40
BLOCK_SIZE = 16
RING_BLOCK_SIZE = 12
LENGTHS = (108, 97)
CHUNKS = (64, 31, 1)
"""Prompt chunks, then tokens one by one from the last entry on."""

SNAPSHOT_TOKENS = 64
DTYPES = (torch.float32, torch.bfloat16)
QUANTISED = "int8_per_token_head"


@dataclass(frozen=True, kw_only=True)
class Result:
    """One comparison.

    Attributes:
        name: head size and dtype, and what the retrieval heads keep if that is another.
        error: largest absolute difference from float64; NaN where an output was not written.
        bound: twice the error of the same sums in the operators' own dtype, and one rounding.
    """

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; a NaN is not."""
        return self.error <= self.bound


def self_test() -> list[Result]:
    """Compare every dtype at two head sizes, and with quantised retrieval heads at one."""
    cases: list[tuple[int, torch.dtype, str | None]]
    cases = [(head_size, dtype, None) for head_size in (64, 128) for dtype in DTYPES]
    if cpu.runs(torch.empty(0)):
        cases += [(64, dtype, QUANTISED) for dtype in DTYPES]
    return [_compare(*case, seed) for seed, case in enumerate(cases)]


def _compare(head_size: int, dtype: torch.dtype, cache_dtype: str | None, seed: int) -> Result:
    generator = torch.Generator().manual_seed(seed)

    def random(tokens: int, heads: int) -> torch.Tensor:
        drawn = torch.randn(tokens, heads, head_size, generator=generator, dtype=torch.float64)
        return drawn.to(dtype)

    kv_heads = len(RETRIEVAL)
    requests = [
        (random(n, kv_heads * GROUP), random(n, kv_heads), random(n, kv_heads)) for n in LENGTHS
    ]
    form = None if cache_dtype is None else FORMATS[cache_dtype]
    served = _Served(head_size, dtype, form).serve(requests)
    error = plain_error = largest = 0.0
    for (q, k, v), output in zip(requests, served, strict=True):
        exact, plain = _rules(q, *_kept(k, v, form), dtype)
        wrong = (output.double() - exact).abs().max().item()
        error = math.nan if math.isnan(wrong) else max(error, wrong)
        plain_error = max(plain_error, (plain.double() - exact).abs().max().item())
        largest = max(largest, exact.abs().max().item())
    rounding = torch.finfo(dtype).eps * largest
    name = f"head size {head_size}, {str(dtype).removeprefix('torch.')}"
    if cache_dtype is not None:
        name += f", retrieval heads {cache_dtype}"
    return Result(name=name, error=error, bound=2 * plain_error + rounding)


def _kept(
    k: torch.Tensor, v: torch.Tensor, form: CacheFormat | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, Hkv, D] of what the caches keep; ``form``: of the retrieval heads."""
    if form is None:
        return k, v
    quantised = torch.tensor(RETRIEVAL)[:, None]
    kept = dequantise(quantise(k, v, form), form)
    return torch.where(quantised, kept[0], k), torch.where(quantised, kept[1], v)


def _rules(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule in float64 and in ``dtype``; in one thread, since the tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _rule(q, k, v, torch.float64), _rule(q, k, v, dtype)
    finally:
        torch.set_num_threads(threads)


def _rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[T, Hq, D] of ``dtype``: a query at i sees key j iff j <= i and, streaming, sink or recent."""
    tokens, heads, size = q.shape
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    output = torch.empty(tokens, heads, size, dtype=dtype)
    for head in range(heads):
        own = head // GROUP
        visible = j <= i
        if not RETRIEVAL[own]:
            visible = visible & ((j < SINK_SIZE) | (j > i - RECENT_SIZE))
        logits = (q[:, head].to(dtype) @ k[:, own].to(dtype).T) * size**-0.5
        weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
        output[:, head] = weights @ v[:, own].to(dtype)
    return output


class _Served:
    """Caches and tables for the requests of ``LENGTHS``; one row and one snapshot are spare."""

    def __init__(self, head_size: int, dtype: torch.dtype, form: CacheFormat | None) -> None:
        self.scale = head_size**-0.5
        self.heads = HeadMap.from_mask(np.array(RETRIEVAL), torch.device("cpu"))
        rows = len(LENGTHS)
        width = -(-max(LENGTHS) // BLOCK_SIZE)
        ring_width = -(-(SINK_SIZE + RECENT_SIZE) // RING_BLOCK_SIZE)
        paged = torch.arange(1, 1 + rows * width, dtype=torch.int32).reshape(rows, width)
        ring = torch.arange(1, 1 + rows * ring_width, dtype=torch.int32).reshape(rows, ring_width)
        first = 1 + rows * ring_width
        self.snapshot = torch.arange(first, first + ring_width)

        def cache(blocks: int, heads: int, size: int) -> torch.Tensor:
            return torch.full((blocks, heads, size, 2 * head_size), torch.nan, dtype=dtype)

        retrieval = cache(1 + rows * width, sum(RETRIEVAL), BLOCK_SIZE)
        if form is not None:
            # Ones everywhere are NaN in the scales.
            shape = (*retrieval.shape[:3], form.row_bytes(head_size))
            retrieval = torch.full(shape, 255, dtype=torch.uint8)
        self.caches = LayerCaches(
            retrieval=retrieval,
            paged=PagedTable(paged, BLOCK_SIZE),
            streaming=cache(first + ring_width, len(RETRIEVAL) - sum(RETRIEVAL), RING_BLOCK_SIZE),
            ring=RingTable(ring, RING_BLOCK_SIZE, SINK_SIZE, RECENT_SIZE, RECENT_SIZE),
            form=form,
            streaming_quantised=False,
        )

    def serve(
        self, requests: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    ) -> list[torch.Tensor]:
        """[T, Hq, D] of each request.

        The first request's state at ``SNAPSHOT_TOKENS`` is stored, its ring is overwritten with NaN,
        and it resumes from the snapshot.
        """
        outputs = [torch.full_like(q, torch.nan) for q, _, _ in requests]
        done = [0] * len(requests)
        step = 0
        while any(at < len(q) for at, (q, _, _) in zip(done, requests, strict=True)):
            chunk = CHUNKS[min(step, len(CHUNKS) - 1)]
            news = [min(chunk, len(q) - at) for at, (q, _, _) in zip(done, requests, strict=True)]
            copies = self._copies(step)
            self._step(requests, done, news, outputs, copies)
            done = [at + new for at, new in zip(done, news, strict=True)]
            step += 1
        return outputs

    def _copies(self, step: int) -> tuple[SnapshotCopy, ...]:
        if step > 1:
            return ()
        if step == 1:
            assert self.caches.ring is not None
            assert self.caches.streaming is not None
            self.caches.streaming[self.caches.ring.block_table[0].long()] = torch.nan
        return (
            SnapshotCopy(store=step == 0, row=0, num_tokens=SNAPSHOT_TOKENS, blocks=self.snapshot),
        )

    def _step(
        self,
        requests: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
        done: list[int],
        news: list[int],
        outputs: list[torch.Tensor],
        copies: tuple[SnapshotCopy, ...],
    ) -> None:
        """One step of all requests, as ``attention/impl.py`` orders it."""
        starts = np.cumsum([0, *news])
        lengths = [at + new for at, new in zip(done, news, strict=True)]
        batch = Batch.from_host(starts, lengths, len(news) if max(news) == 1 else 0)
        q, k, v = (
            torch.cat(
                [r[part][at : at + new] for r, at, new in zip(requests, done, news, strict=True)]
            )
            for part in range(3)
        )
        assert self.caches.ring is not None
        caches = replace(self.caches, ring=replace(self.caches.ring, copies=copies))
        output = torch.full_like(q, torch.nan)
        write_retrieval(k, v, self.heads, caches, batch)
        copy_snapshots(k, v, self.heads, caches, batch)
        decode(q, k, v, self.heads, caches, batch, self.scale, output)
        prefill(q, k, v, self.heads, caches, batch, self.scale, output)
        write_streaming(k, v, self.heads, caches, batch)
        for row, (at, new) in enumerate(zip(done, news, strict=True)):
            outputs[row][at : at + new] = output[starts[row] : starts[row + 1]]
