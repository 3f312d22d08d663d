"""PyTorch implementation of ``decode``."""

from __future__ import annotations

import torch

from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches
from vllm_duo.ops.pieces import attend
from vllm_duo.ops.tiles import make_tiles


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
    scale: float,
    output: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> None:
    """See ``vllm_duo.ops.decode``: one tile a request, as long as the longest chunk."""
    longest = int(batch.query_lens[: batch.num_decodes].max(initial=0))
    if longest == 0:
        return
    tiles = batch.memo("decode", lambda: make_tiles(batch, 0, batch.num_decodes, longest))
    attend(query, key, value, heads, caches, batch, tiles, scale, output, sinks)
