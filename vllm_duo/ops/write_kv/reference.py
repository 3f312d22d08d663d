"""PyTorch implementation of ``write_kv``."""

from __future__ import annotations

import numpy as np
import torch

from vllm_duo.ops.batch import Batch, HeadMap, IntArray, LayerCaches, PagedTable, RingTable
from vllm_duo.ops.validate import FULL_CHECKS


def write_retrieval(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
) -> None:
    """See ``vllm_duo.ops.write_kv``."""
    if batch.num_tokens == 0 or caches.retrieval is None or caches.paged is None:
        return
    paged = caches.paged
    slots = batch.memo(("paged", paged), lambda: _paged_slots(batch, paged, key.device))
    scatter(key, value, heads.retrieval, caches.retrieval, *slots)


def write_streaming(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
) -> None:
    """See ``vllm_duo.ops.write_kv``."""
    if batch.num_tokens == 0 or caches.streaming is None or caches.ring is None:
        return
    ring = caches.ring
    slots = batch.memo(("ring", ring), lambda: _ring_slots(batch, ring, key.device))
    scatter(key, value, heads.streaming, caches.streaming, *slots)


def _token_positions(batch: Batch) -> tuple[IntArray, IntArray]:
    """[T] request of each token and its position in the request."""
    request = np.repeat(np.arange(batch.num_reqs), batch.query_lens)
    local = np.arange(batch.num_tokens) - batch.host_query_start_loc[request]
    return request, batch.context_lens[request] + local


def _look_up(
    table: torch.Tensor, request: IntArray, column: IntArray, device: torch.device
) -> torch.Tensor:
    """Block ids [n] int64 at the given rows and columns."""
    rows = torch.from_numpy(request).to(device)
    blocks = table[rows, torch.from_numpy(column).to(device)].long()
    if FULL_CHECKS and bool((blocks == 0).any()):
        raise RuntimeError("a token would be written into the null block 0")
    return blocks


def _paged_slots(
    batch: Batch, table: PagedTable, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    request, position = _token_positions(batch)
    blocks = _look_up(table.block_table, request, position // table.block_size, device)
    tokens = torch.arange(batch.num_tokens, device=device)
    return tokens, blocks, torch.from_numpy(position % table.block_size).to(device)


def _ring_slots(
    batch: Batch, table: RingTable, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    request, position = _token_positions(batch)
    # Of two tokens with one slot only the later may be written: drop what the chunk overtakes.
    overtaken = position < batch.host_seq_lens[request] - table.ring_size
    token = np.flatnonzero((position < table.sink_size) | ~overtaken)
    column, offset = table.table_slots(position[token])
    blocks = _look_up(table.block_table, request[token], column, device)
    return torch.from_numpy(token).to(device), blocks, torch.from_numpy(offset).to(device)


def scatter(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: torch.Tensor,
    kv_cache: torch.Tensor,
    tokens: torch.Tensor,
    blocks: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """Copy the tokens' keys and values of ``heads`` to [blocks, :, offsets]."""
    picked = heads[None]
    rows = tokens[:, None]
    kv_cache[blocks, :, offsets] = torch.cat([key[rows, picked], value[rows, picked]], dim=-1)
