"""Reference attention by query tiles, shared by ``decode`` and ``prefill``.

Queries are cut into tiles of at most ``tile_size`` tokens of one request; all tiles and heads are
computed together. Keys come in pieces (``pieces.py``) merged by online softmax, so memory stays
bounded at any context length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from vllm_duo.ops.batch import Batch, IntArray


@dataclass(frozen=True, eq=False)
class Tiles:
    """Query tiles; NT of them, TQ = ``size`` query slots each.

    Attributes:
        size: TQ.
        request: [NT] request of each tile.
        length: [NT] queries in the tile, at most TQ.
        start: [NT] index of the tile's first query in the flat token order.
        position: [NT] position of the tile's first query in its request.
        chunk_start: [NT] flat index of the first token of the request's chunk.
        context: [NT] tokens that the caches hold of the request.
    """

    size: int
    request: IntArray
    length: IntArray
    start: IntArray
    position: IntArray
    chunk_start: IntArray
    context: IntArray

    @cached_property
    def query_index(self) -> IntArray:
        """[NT, TQ] flat index of each query slot; empty slots repeat the tile's last query."""
        slots: IntArray = np.minimum(np.arange(self.size), self.length[:, None] - 1)
        return slots + self.start[:, None]

    @cached_property
    def query_position(self) -> IntArray:
        """[NT, TQ] position of each query slot; empty slots repeat the tile's last query."""
        return self.query_index - self.start[:, None] + self.position[:, None]


def make_tiles(batch: Batch, first: int, last: int, tile_size: int) -> Tiles:
    """Cut the chunks of requests ``first`` to ``last - 1`` into tiles; empty chunks give none."""
    lens = batch.query_lens[first:last]
    per_request = -(-lens // tile_size)
    request = np.repeat(np.arange(first, last), per_request)
    ordinal = np.arange(len(request)) - np.repeat(np.cumsum(per_request) - per_request, per_request)
    offset = ordinal * tile_size
    chunk_start = batch.host_query_start_loc[request]
    context = batch.context_lens[request]
    return Tiles(
        size=tile_size,
        request=request,
        length=np.minimum(tile_size, batch.query_lens[request] - offset),
        start=chunk_start + offset,
        position=context + offset,
        chunk_start=chunk_start,
        context=context,
    )


class TiledAttention:
    """Online softmax over pieces of keys for one class of heads and all tiles.

    Args:
        query: [T, Hq, D], any float dtype.
        heads: [H] int64, the KV heads of the class.
        num_kv_heads: Hkv.
        tiles: the query tiles.
        scale: factor on the logits.
        sinks: [Hq] float32, learned logits without a value; None: there are none.
    """

    def __init__(
        self,
        query: torch.Tensor,
        heads: torch.Tensor,
        num_kv_heads: int,
        tiles: Tiles,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> None:
        num_tokens, num_heads, head_size = query.shape
        self.tiles = tiles
        self.heads = heads
        self.grouped = (num_tokens, num_kv_heads, num_heads // num_kv_heads, head_size)
        self.index = torch.from_numpy(tiles.query_index).to(query.device)
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        picked = query.view(self.grouped)[self.index[:, None], heads[None, :, None]]
        # [NT, H, TQ, G, D] -> [NT, H, TQ * G, D]
        self.q = picked.flatten(2, 3).to(dtype) * scale
        self.max = self.q.new_full(self.q.shape[:-1], -torch.inf)
        self.sum = torch.zeros_like(self.max)
        self.acc = torch.zeros_like(self.q)
        self.sinks = sinks

    def add(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        visible: torch.Tensor | None,
        rows: torch.Tensor | slice = slice(None),
    ) -> None:
        """Merge one piece of keys.

        Args:
            keys: [n, H, K, D] of the tiles ``rows``; may hold garbage where nothing sees it.
            values: [n, H, K, D], finite where no query sees them.
            visible: [n, 1 or TQ, K] bool, which query slot sees which key; None for all.
            rows: the tiles that the piece belongs to.
        """
        q = self.q[rows]
        n, num_heads = q.shape[:2]
        logits = q @ keys.to(q.dtype).mT  # [n, H, TQ * G, K]
        if visible is not None:
            split = logits.view(n, num_heads, self.tiles.size, -1, logits.shape[-1])
            split.masked_fill_(~visible[:, None, :, None], -torch.inf)
        new_max = torch.maximum(self.max[rows], logits.amax(-1))
        # A row that has seen nothing yet keeps weight 0 instead of exp(-inf + inf).
        base = new_max.masked_fill(new_max == -torch.inf, 0.0)
        weights = logits.sub_(base[..., None]).exp_()
        decay = (self.max[rows] - base).exp_()
        self.sum[rows] = self.sum[rows] * decay + weights.sum(-1)
        self.acc[rows] = self.acc[rows] * decay[..., None] + weights @ values.to(q.dtype)
        self.max[rows] = new_max

    def store(self, output: torch.Tensor) -> None:
        """Write the result at the tiles' tokens and the class's heads of ``output`` [T, Hq, D]."""
        size, group = self.tiles.size, self.grouped[2]
        total = self.sum
        if self.sinks is not None:
            own = self.sinks.view(-1, group)[self.heads].repeat(1, size)  # [H, TQ * G]
            total = total + (own - self.max).exp()
        result = self.acc / total[..., None]
        slots = torch.arange(size, device=output.device)
        lengths = torch.from_numpy(self.tiles.length).to(output.device)
        used = slots < lengths[:, None]  # [NT, TQ]
        tokens = self.index[used]
        result = result.view(*result.shape[:2], size, group, -1)
        # [NT, H, TQ, G, D] -> [used tokens, H, G, D]
        rows = result.transpose(1, 2)[used].to(output.dtype)
        output.view(self.grouped)[tokens[:, None], self.heads] = rows
