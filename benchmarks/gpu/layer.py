"""A layer's tensors at one point: one cache of all heads, and the rings of each sparsity."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from benchmarks.gpu.cases import Point
from benchmarks.gpu.retrieval_kernels import Kernel
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches, PagedTable, RingTable
from vllm_duo.ops.gpu import RetrievalPrefill

PIECE = 65536
"""Tokens that are copied at once."""


class Attend(Protocol):
    """``vllm_duo.ops.layer.triton.attend_and_write``: all that a layer does in a step."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        heads: HeadMap,
        caches: LayerCaches,
        batch: Batch,
        scale: float,
        output: torch.Tensor,
        retrieval_prefill: RetrievalPrefill | None = None,
    ) -> None:
        """Attention and the writes into both caches."""


@dataclass(eq=False)
class Layer:
    """One layer's tensors, of which all contenders read the same.

    The cache of all heads is paged, its blocks in random order as after hours of serving, and holds
    the step's own tokens already. A contender with S streaming heads takes the last Hkv - S heads of it
    through strides, as a server's layers share a block too, and has a ring of its own for the others.

    Attributes:
        point: what is measured.
        device: where.
        seed: of the numbers.
    """

    point: Point
    device: torch.device
    seed: int = 0
    query: torch.Tensor = field(init=False)
    key: torch.Tensor = field(init=False)
    value: torch.Tensor = field(init=False)
    cache: torch.Tensor = field(init=False)
    table: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        point, shape = self.point, self.point.shape
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def random(*sizes: int) -> torch.Tensor:
            found = torch.empty(sizes, device=self.device, dtype=torch.bfloat16)
            return found.normal_(generator=generator)

        width = -(-point.context // shape.block_size)
        order = torch.randperm(point.requests * width, generator=generator, device=self.device)
        self.table = (1 + order.int()).view(point.requests, width)
        size = shape.head_size
        self.query = random(point.num_tokens, shape.num_heads, size)
        self.cache = random(
            point.requests * width + 1, shape.num_kv_heads, shape.block_size, 2 * size
        )
        # Keys twice as large as usual: attention with clear peaks shows a wrong key.
        self.cache[..., :size] *= 2
        positions = torch.arange(point.before, point.context, device=self.device)
        own = torch.cat([self.rows(request, positions) for request in range(point.requests)])
        self.key, self.value = (part.contiguous() for part in own.chunk(2, dim=-1))

    def rows(self, request: int, positions: torch.Tensor) -> torch.Tensor:
        """[n, Hkv, 2 * D] keys and values at positions [n] of a request, from the cache."""
        size = self.point.shape.block_size
        return self.cache[self.table[request, positions // size].long(), :, positions % size]

    @cached_property
    def batch(self) -> Batch:
        """The step's requests."""
        point = self.point
        return Batch.from_host(
            np.arange(point.requests + 1) * point.chunk,
            np.full(point.requests, point.context),
            point.requests if point.kind == "decode" else 0,
            self.device,
        )

    @cached_property
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, Hkv, context, D], contiguous, as no serving engine has them."""
        point, shape = self.point, self.point.shape
        sizes = (point.requests, shape.num_kv_heads, point.context, shape.head_size)
        keys, values = (
            torch.empty(sizes, device=self.device, dtype=self.cache.dtype) for _ in range(2)
        )
        for request in range(point.requests):
            for begin in range(0, point.context, PIECE):
                piece = slice(begin, min(begin + PIECE, point.context))
                rows = self.rows(request, torch.arange(piece.start, piece.stop, device=self.device))
                own_keys, own_values = rows.transpose(0, 1).chunk(2, dim=-1)
                keys[request, :, piece], values[request, :, piece] = own_keys, own_values
        return keys, values


class DuoStep:
    """A layer's step by this package's kernels.

    Args:
        layer: its tensors.
        streaming: KV heads that stream, the layer's first.
        attend: the step.
        kernel: for the prefills' retrieval heads; None: Triton's, which serves all heads.
    """

    def __init__(
        self, layer: Layer, streaming: int, attend: Attend, kernel: Kernel | None = None
    ) -> None:
        self.layer, self.streaming, self.attend = layer, streaming, attend
        self.retrieval_prefill = kernel and kernel.make()
        point, shape = layer.point, layer.point.shape
        self.output = torch.empty_like(layer.query)
        self.heads = HeadMap.from_mask(np.arange(shape.num_kv_heads) >= streaming, layer.device)
        retrieval = layer.cache[:, streaming:]
        width = -(-(shape.sink_size + shape.recent_size) // shape.block_size)
        blocks = point.requests * width
        table = 1 + torch.arange(blocks, dtype=torch.int32, device=layer.device)
        ring = torch.zeros(
            (blocks + 1, streaming, *layer.cache.shape[2:]),
            dtype=layer.cache.dtype,
            device=layer.device,
        )
        self.caches = LayerCaches(
            retrieval if retrieval.numel() else None,
            PagedTable(layer.table, shape.block_size) if retrieval.numel() else None,
            ring if streaming else None,
            RingTable(
                table.view(point.requests, width),
                shape.block_size,
                shape.sink_size,
                shape.recent_size,
                shape.recent_size,
            )
            if streaming
            else None,
        )
        self.reset()

    def reset(self) -> None:
        """Fill the ring with what it holds before the step, and the output with NaN."""
        self.output.fill_(torch.nan)
        ring, cache = self.caches.ring, self.caches.streaming
        if ring is None or cache is None:
            return
        before = self.layer.point.before
        recent = np.arange(max(before - ring.ring_size, 0), before)
        positions = np.union1d(np.arange(min(before, ring.sink_size)), recent)
        columns, offsets = (
            torch.from_numpy(part).to(self.layer.device) for part in ring.table_slots(positions)
        )
        at = torch.from_numpy(positions).to(self.layer.device)
        for request, row in enumerate(ring.block_table):
            held = self.layer.rows(request, at)[:, : self.streaming]
            cache[row[columns].long(), :, offsets] = held

    def __call__(self) -> torch.Tensor:
        """Run the step.

        Returns:
            The output [T, Hq, D], the same tensor each time.
        """
        layer = self.layer
        self.attend(
            layer.query,
            layer.key,
            layer.value,
            self.heads,
            self.caches,
            layer.batch,
            layer.point.shape.head_size**-0.5,
            self.output,
            retrieval_prefill=self.retrieval_prefill,
        )
        return self.output
