"""What the Triton kernels share: where a token lies, and one step of attention.

Kernels are written once for both head classes. *Slots* are where a request's context lies in a cache:
for a retrieval head slot p is position p; for a streaming head the first ``sink_size`` slots are the
sink's and the others the ring's (``RingTable``). Addresses are computed in int64.

Without a GPU the kernels run in Triton's interpreter, if ``TRITON_INTERPRET=1`` is set before this
module is imported.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# The interpreter keeps bfloat16 as raw uint16 and its `tl.dot` multiplies those bits as integers
# (Triton 3.9): there, operands are widened first. Products of two halves are exact in float32, as in
# a tensor core.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def requests_of(start_ptr, token, num_reqs, BLOCK_B: tl.constexpr):
    """[T] request of each token: how many requests end at or before it; num_reqs for padding."""
    b = tl.arange(0, BLOCK_B)
    ends = tl.load(start_ptr + 1 + b, mask=b < num_reqs, other=2147483647)
    return tl.sum((ends[None, :] <= token[:, None]).to(tl.int32), axis=1)


@triton.jit
def slot_of(position, sink, ring):
    """Slot of a position in a streaming head's table."""
    return tl.where(position < sink, position, sink + (position - sink) % ring)


@triton.jit
def position_in(slot, context, sink, ring):
    """Position that a used slot of a streaming head holds, for a context of so many tokens."""
    turns = (context - sink - 1 - (slot - sink)) // ring
    return tl.where(slot < sink, slot, slot + turns * ring)


@triton.jit
def dot(a, b, accumulator):
    """Product in float32; float32 operands keep all their bits."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def fold(q, k, v, seen, top, total, acc, scale):
    """Merge keys into the running softmax of a tile.

    q [M, D]; k, v [N, D]; seen [M, N]; top, total [M] float32; acc [M, D] float32; ``scale`` includes
    log2(e). A row that has seen nothing keeps top = -inf and total = 0.
    """
    logits = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32)) * scale
    logits = tl.where(seen, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, axis=1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(logits - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, axis=1)
    acc = dot(weights.to(v.dtype), v, acc * decay[:, None])
    return new_top, total, acc


@triton.jit
def add_sinks(total, top, sinks_ptr, query_head, used):
    """[M] the sums of a tile's weights with the learned sinks of its rows' query heads.

    ``top`` and ``total`` as ``fold`` left them; a sink takes part like one more key, once a row.
    """
    sink = tl.load(sinks_ptr + query_head, mask=used, other=float("-inf"))
    base = tl.where(top == float("-inf"), 0.0, top)
    return total + tl.exp2(sink * 1.4426950408889634 - base)


@triton.jit
def load_rows(at, held, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """[N, BLOCK_D] rows at the pointers ``at`` [N]; zeros where not ``held`` and beyond HEAD."""
    d = tl.arange(0, BLOCK_D)
    mask = held[:, None]
    if HEAD != BLOCK_D:
        mask = mask & (d < HEAD)[None, :]
    return tl.load(at[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def fold_slots(
    q,
    top,
    total,
    acc,
    first_tile,
    last_tile,
    num_slots,
    context,
    first_query,
    query_position,
    cache_ptr,
    stride_block,
    stride_token,
    row_ptr,
    sink,
    recent,
    ring,
    scale,
    STREAMING: tl.constexpr,
    PAGE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BUFFERS: tl.constexpr,
):
    """Merge the slots of tiles ``first_tile`` to ``last_tile - 1`` of a request's context.

    ``cache_ptr`` points at the head, ``row_ptr`` at the request's table row, ``first_query`` is the
    tile's lowest query position. A slot that no query of the tile sees is not even read: it may hold
    anything.

    ``BUFFERS`` is ``gpu.Tiling.buffers``. Triton issues the loads of a later tile at the end of a
    turn of its loop, and shares the stages among loads that wait for one another, here the table's
    and the rows': so many stages it takes for the rows to be a tile ahead.
    """
    n = tl.arange(0, BLOCK_N)
    for tile in tl.range(first_tile, last_tile, num_stages=1 + 2 * BUFFERS):
        slot = tile * BLOCK_N + n
        held = slot < num_slots
        seen = held[None, :]
        if STREAMING:
            position = position_in(slot, context, sink, ring)
            in_sink = position < sink
            held = held & (in_sink | (position > first_query - recent))
            reach = position[None, :] > query_position[:, None] - recent
            seen = seen & (in_sink[None, :] | reach)
        block = tl.load(row_ptr + slot // PAGE, mask=held, other=0).to(tl.int64)
        at = cache_ptr + block * stride_block + (slot % PAGE).to(tl.int64) * stride_token
        k = load_rows(at, held, HEAD, BLOCK_D)
        v = load_rows(at + HEAD, held, HEAD, BLOCK_D)
        top, total, acc = fold(q, k, v, seen, top, total, acc, scale)
    return top, total, acc


@triton.jit
def fold_tokens(
    q,
    top,
    total,
    acc,
    low,
    high,
    context,
    query_position,
    key_ptr,
    stride_key,
    value_ptr,
    stride_value,
    sink,
    recent,
    scale,
    STREAMING: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BUFFERS: tl.constexpr,
):
    """Merge the chunk's own tokens at positions ``low`` to ``high - 1``.

    ``key_ptr`` and ``value_ptr`` point at the head in the chunk's first token. ``BUFFERS`` as in
    ``fold_slots``, 0 where no load is to run ahead; none waits for another here.
    """
    n = tl.arange(0, BLOCK_N)
    for start in tl.range(low, high, BLOCK_N, num_stages=1 + BUFFERS):
        position = start + n
        held = position < high
        seen = held[None, :] & (position[None, :] <= query_position[:, None])
        if STREAMING:
            reach = position[None, :] > query_position[:, None] - recent
            seen = seen & ((position < sink)[None, :] | reach)
        token = (position - context).to(tl.int64)
        k = load_rows(key_ptr + token * stride_key, held, HEAD, BLOCK_D)
        v = load_rows(value_ptr + token * stride_value, held, HEAD, BLOCK_D)
        top, total, acc = fold(q, k, v, seen, top, total, acc, scale)
    return top, total, acc
