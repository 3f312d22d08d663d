"""One attention layer's step with this package's kernels and with stock vLLM's, over the same shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from vllm import _custom_ops as stock_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_duo.kv_cache.formats import FORMATS, CacheFormat
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches, PagedTable, RingTable
from vllm_duo.ops.layer import attend_and_write
from vllm_duo.ops.quantise import quantise

BLOCK_TOKENS = 128
RING_BLOCK_TOKENS = 16
SINK_TOKENS, RECENT_TOKENS = 64, 256


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A step: each of ``requests`` requests has ``context`` tokens and gets ``chunk`` more."""

    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    context: int
    chunk: int
    requests: int = 1
    head_size: int = 64
    kv_cache_dtype: str = "auto"

    @property
    def form(self) -> CacheFormat | None:
        """Format of a quantised cache."""
        return FORMATS.get(self.kv_cache_dtype)

    @property
    def row(self) -> int:
        """Elements of a token in one head's cache."""
        return self.form.row_bytes(self.head_size) if self.form else 2 * self.head_size

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        return float(self.head_size**-0.5)

    @property
    def starts(self) -> list[int]:
        """First token of each request's chunk, and the end."""
        return [i * self.chunk for i in range(self.requests + 1)]

    @property
    def seq_lens(self) -> list[int]:
        """Tokens of each request with its chunk."""
        return [self.context + self.chunk] * self.requests

    @property
    def width(self) -> int:
        """Blocks of a request."""
        return -(-(self.context + self.chunk) // BLOCK_TOKENS)

    def table(self) -> torch.Tensor:
        """[B, width] int32, every request with blocks of its own, shuffled."""
        order = torch.randperm(
            self.requests * self.width, generator=torch.Generator().manual_seed(1)
        )
        return (1 + order).int().view(self.requests, self.width)

    def activations(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [T, Hq, D], key and value [T, Hkv, D]."""
        generator = torch.Generator().manual_seed(seed)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        tokens = self.requests * self.chunk
        query, key, value = (
            torch.randn(tokens, n, self.head_size, generator=generator).to(self.dtype)
            for n in heads
        )
        return query, key, value

    def needed_bytes(self, streaming: int) -> int:
        """Bytes of keys and values that a decode step must read."""
        full = self.context + self.chunk
        tokens = (self.num_kv_heads - streaming) * full
        tokens += streaming * min(full, SINK_TOKENS + RECENT_TOKENS)
        return self.requests * tokens * self.row * (1 if self.form else self.dtype.itemsize)

    def operations(self, streaming: int) -> int:
        """Multiplications and additions of the attention itself."""
        first, last = self.context + 1, self.context + self.chunk
        full = (first + last) * self.chunk // 2
        band = sum(min(n, SINK_TOKENS + RECENT_TOKENS) for n in range(first, last + 1))
        pairs = (self.num_kv_heads - streaming) * full + streaming * band
        group = self.num_heads // self.num_kv_heads
        return 4 * self.requests * pairs * self.head_size * group


def random_cache(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Random contents, the same for the same shape."""
    generator = torch.Generator().manual_seed(2)
    tile = torch.randn(min(1 << 20, int(np.prod(shape))), generator=generator).to(dtype)
    cache = torch.empty(shape, dtype=dtype)
    flat = cache.view(-1)
    for begin in range(0, len(flat), len(tile)):
        flat[begin : begin + len(tile)] = tile[: len(flat) - begin]
    return cache


def random_rows(shape: tuple[int, ...], step: Shape) -> torch.Tensor:
    """A cache of this shape with random keys and values, quantised where the step's are."""
    if step.form is None:
        return random_cache(shape, step.dtype)
    generator = torch.Generator().manual_seed(2)
    key, value = (torch.randn(4096, step.head_size, generator=generator) for _ in range(2))
    rows = quantise(key, value, step.form)
    count = int(np.prod(shape[:-1]))
    return rows.repeat(-(-count // len(rows)), 1)[:count].view(shape)


class DuoLayer:
    """Both classes with this package's kernels; the first ``streaming`` KV heads stream."""

    def __init__(self, shape: Shape, streaming: int) -> None:
        self.shape, self.streaming = shape, streaming
        retrieval = shape.num_kv_heads - streaming
        mask = np.arange(shape.num_kv_heads) >= streaming
        self.heads = HeadMap.from_mask(mask, torch.device("cpu"))
        slots = -(-(SINK_TOKENS + RECENT_TOKENS) // RING_BLOCK_TOKENS)
        ring = torch.arange(1, shape.requests * slots + 1, dtype=torch.int32)
        ring = ring.view(shape.requests, slots)
        blocks = shape.requests * shape.width + 1
        ring_blocks = shape.requests * slots + 1
        retrieval_shape = (blocks, retrieval, BLOCK_TOKENS, shape.row)
        streaming_shape = (ring_blocks, streaming, RING_BLOCK_TOKENS, shape.row)
        table = PagedTable(shape.table(), BLOCK_TOKENS)
        self.caches = LayerCaches(
            random_rows(retrieval_shape, shape) if retrieval else None,
            table if retrieval else None,
            random_rows(streaming_shape, shape) if streaming else None,
            RingTable(ring, RING_BLOCK_TOKENS, SINK_TOKENS, RECENT_TOKENS, RECENT_TOKENS)
            if streaming
            else None,
            shape.form,
        )

    def step(self, shape: Shape, seed: int = 0) -> Callable[[], torch.Tensor]:
        """The layer's whole step, to be called any number of times; returns the output."""
        query, key, value = shape.activations(seed)
        output = torch.empty_like(query)
        decodes = shape.requests if shape.chunk == 1 else 0
        batch = Batch.from_host(shape.starts, shape.seq_lens, decodes)

        def run() -> torch.Tensor:
            attend_and_write(query, key, value, self.heads, self.caches, batch, shape.scale, output)
            return output

        return run


class StockLayer:
    """Every head full, with the kernels of vLLM's CPU_ATTN backend."""

    def __init__(self, shape: Shape) -> None:
        self.table = shape.table()
        blocks = shape.requests * shape.width + 1
        size = (blocks, shape.num_kv_heads, 2 * BLOCK_TOKENS, shape.head_size)
        self.key, self.value = random_cache(size, shape.dtype).chunk(2, dim=2)

    def step(self, shape: Shape, seed: int = 0) -> Callable[[], torch.Tensor]:
        """As ``DuoLayer.step``."""
        query, key, value = shape.activations(seed)
        output = torch.empty_like(query)
        isa = _get_attn_isa(shape.dtype, BLOCK_TOKENS, shape.head_size)
        starts = torch.tensor(shape.starts, dtype=torch.int32)
        lens = torch.tensor(shape.seq_lens, dtype=torch.int32)
        metadata = stock_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=shape.requests,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_size,
            seq_lens=lens,
            dtype=shape.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )
        position = torch.arange(shape.context, shape.context + shape.chunk)
        block = self.table.long()[:, position // BLOCK_TOKENS] * BLOCK_TOKENS
        slots = (block + position % BLOCK_TOKENS).flatten()

        def run() -> torch.Tensor:
            stock_ops.cpu_attn_reshape_and_cache(key, value, self.key, self.value, slots, isa)
            stock_ops.cpu_attention_with_kv_cache(
                query=query,
                key_cache=self.key,
                value_cache=self.value,
                output=output,
                query_start_loc=starts,
                seq_lens=lens,
                scale=shape.scale,
                causal=True,
                alibi_slopes=None,
                sliding_window=-1,
                block_table=self.table,
                softcap=0,
                scheduler_metadata=metadata,
                s_aux=None,
            )
            return output

        return run
