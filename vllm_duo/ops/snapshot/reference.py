"""PyTorch implementation of ``copy_snapshots``."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches, RingTable, SnapshotCopy
from vllm_duo.ops.write_kv.reference import scatter


def copy_snapshots(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
) -> None:
    """See ``vllm_duo.ops.snapshot``."""
    ring, kv_cache = caches.ring, caches.streaming
    assert ring is not None
    assert kv_cache is not None
    for copy in ring.copies:
        table = ring.block_table[copy.row, : len(copy.blocks)].long()
        check_copy(batch, ring, copy)
        if not copy.store:
            kv_cache[table] = kv_cache[copy.blocks]
            continue
        # A slot that the chunk does not write before the boundary holds what it held in the ring.
        kv_cache[copy.blocks] = kv_cache[table]
        plan = partial(_chunk_slots, batch, ring, copy, key.device)
        tokens, columns, offsets = batch.memo(copy, plan)
        scatter(key, value, heads.streaming, kv_cache, tokens, copy.blocks[columns], offsets)


def check_copy(batch: Batch, ring: RingTable, copy: SnapshotCopy) -> None:
    """Check that a copy fits its request: it resumes at the snapshot, or its chunk reaches it.

    A stored boundary may also lie before the chunk, among the drafts that the step before it wrote:
    the ring's slack still holds what a query there sees.

    Raises:
        ValueError: it does not.
    """
    context = int(batch.context_lens[copy.row])
    end = int(batch.host_seq_lens[copy.row])
    first = context - (ring.ring_size - ring.recent_size)
    if copy.store and not first <= copy.num_tokens <= end:
        raise ValueError(
            f"a snapshot at {copy.num_tokens} tokens needs a chunk that reaches it, got tokens "
            f"{first} to {end}"
        )
    if not copy.store and context != copy.num_tokens:
        raise ValueError(
            f"a snapshot of {copy.num_tokens} tokens cannot restore a request with {context} tokens"
        )


def _chunk_slots(
    batch: Batch, ring: RingTable, copy: SnapshotCopy, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flat index, table column and offset of the chunk's tokens that the state holds."""
    context = int(batch.context_lens[copy.row])
    position = np.arange(context, copy.num_tokens)
    kept = (position < ring.sink_size) | (position >= copy.num_tokens - ring.ring_size)
    position = position[kept]
    column, offset = ring.table_slots(position)
    token = batch.host_query_start_loc[copy.row] + position - context
    return (
        torch.from_numpy(token).to(device),
        torch.from_numpy(column).to(device),
        torch.from_numpy(offset).to(device),
    )
