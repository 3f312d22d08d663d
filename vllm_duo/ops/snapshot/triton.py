"""Triton kernel of ``copy_snapshots``: one launch for all copies of a step.

Copies have an order: a later one may read what an earlier one has stored. Table column j of a copy only
ever meets column j of another, so a program owns some slots of one column and head and carries the
copies out one after another. They come in a device buffer with their number in front: a CUDA graph
replays the kernel over whatever the buffer holds then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_duo.ops import gpu
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches
from vllm_duo.ops.triton_tools import load_rows, position_in

SLOTS = 32
"""Slots of a program at most."""


@triton.jit
def _copy_snapshots(
    key_ptr,
    stride_key_token,
    stride_key_head,
    value_ptr,
    stride_value_token,
    stride_value_head,
    start_ptr,
    len_ptr,
    cache_ptr,
    stride_block,
    stride_head,
    stride_token,
    heads_ptr,
    table_ptr,
    stride_row,
    orders_ptr,
    stride_order,
    sink,
    ring,
    PAGE: tl.constexpr,
    HEAD: tl.constexpr,
    HEADER: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column = tl.program_id(0)
    row = tl.program_id(1)
    offset = tl.program_id(2) * BLOCK_P + tl.arange(0, BLOCK_P)
    slot = column * PAGE + offset
    d = tl.arange(0, BLOCK_D)
    inside = offset < PAGE
    in_block = row.to(tl.int64) * stride_head + offset.to(tl.int64) * stride_token
    head = tl.load(heads_ptr + row).to(tl.int64)
    count = tl.load(orders_ptr)
    for index in range(0, count):
        order = orders_ptr + (index + 1) * stride_order
        store = tl.load(order)
        request = tl.load(order + 1)
        num_tokens = tl.load(order + 2)
        if column < tl.load(order + 3):
            own = tl.load(table_ptr + request.to(tl.int64) * stride_row + column)
            kept = tl.load(order + HEADER + column)
            source = tl.where(store != 0, own, kept).to(tl.int64)
            target = tl.where(store != 0, kept, own).to(tl.int64)
            begin = tl.load(start_ptr + request)
            context = tl.load(len_ptr + request) - (tl.load(start_ptr + request + 1) - begin)
            position = position_in(slot, num_tokens, sink, ring)
            # What the chunk has written there before the boundary comes from the activations.
            fresh = inside & (position >= context) & (slot < tl.minimum(num_tokens, sink + ring))
            fresh = fresh & (tl.zeros([BLOCK_P], tl.int32) + store != 0)
            old = inside & (fresh == 0)
            token = (begin + position - context).to(tl.int64)
            from_cache = cache_ptr + source * stride_block + in_block
            from_key = key_ptr + token * stride_key_token + head * stride_key_head
            from_value = value_ptr + token * stride_value_token + head * stride_value_head
            k = tl.where(
                fresh[:, None],
                load_rows(from_key, fresh, HEAD, BLOCK_D),
                load_rows(from_cache, old, HEAD, BLOCK_D),
            )
            v = tl.where(
                fresh[:, None],
                load_rows(from_value, fresh, HEAD, BLOCK_D),
                load_rows(from_cache + HEAD, old, HEAD, BLOCK_D),
            )
            limit = tl.where(target > 0, PAGE, 0)  # the null block is never written
            mask = (offset < limit)[:, None] & (d < HEAD)[None, :]
            at = (cache_ptr + target * stride_block + in_block)[:, None] + d[None, :]
            tl.store(at, k, mask=mask)
            tl.store(at + HEAD, v, mask=mask)
            # The next copy may read this one's block, and not by the same threads.
            tl.debug_barrier()


def copy_snapshots(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
) -> None:
    """See ``vllm_duo.ops.snapshot``; carries out the ring's ``orders`` where it has them."""
    ring = caches.ring
    _, streaming = gpu.class_arguments(heads, caches, key, retrieval=False)
    if ring is None or streaming.count == 0 or (ring.orders is None and not ring.copies):
        return
    gpu.check_rows(key=key, value=value)
    width = ring.block_table.shape[1]
    orders = ring.orders
    if orders is None:
        orders = batch.memo(("orders", ring), lambda: gpu.pack_copies(ring.copies, width))
    head_size = key.shape[-1]
    block_p = min(gpu.block(ring.block_size), SLOTS)
    _copy_snapshots[(width, streaming.count, triton.cdiv(ring.block_size, block_p))](
        key,
        *key.stride()[:2],
        value,
        *value.stride()[:2],
        batch.query_start_loc,
        batch.seq_lens,
        *streaming.pointers(),
        orders,
        orders.stride(0),
        ring.sink_size,
        ring.ring_size,
        PAGE=ring.block_size,
        HEAD=head_size,
        HEADER=gpu.ORDER_HEADER,
        BLOCK_P=block_p,
        BLOCK_D=gpu.block(head_size),
    )
