"""PyTorch implementation of ``prefill``."""

from __future__ import annotations

import torch

from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches
from vllm_duo.ops.pieces import attend
from vllm_duo.ops.tiles import make_tiles

TILE_SIZE = 128
"""Queries per tile, in tokens: long enough that a gathered key is used by many queries."""


def prefill(
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
    """See ``vllm_duo.ops.prefill``: tiles of up to 128 queries, fewer where chunks are short."""
    longest = int(batch.query_lens[batch.num_decodes :].max(initial=0))
    if longest == 0:
        return
    size = min(TILE_SIZE, longest)
    tiles = batch.memo(
        "prefill", lambda: make_tiles(batch, batch.num_decodes, batch.num_reqs, size)
    )
    attend(query, key, value, heads, caches, batch, tiles, scale, output, sinks)
