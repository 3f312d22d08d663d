"""Triton kernel of ``prefill``: one launch for both classes, one program a query tile and KV head.

A tile's rows are ``BLOCK_M // GROUP`` queries of one request times the query heads of one KV head. A
retrieval head meets its request's pages and then the chunk up to the tile; a streaming head meets the
sink and what is left in reach of the ring, then the chunk's own sink tokens and its band of
``recent_size``: as many keys at any length of the context.

Tiles are numbered without a plan: request b's first tile is ``start[b] // queries + b``, which leaves
at most one empty tile a request (the numbering of vLLM's unified attention kernel).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_duo.ops import gpu
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches
from vllm_duo.ops.triton_tools import add_sinks, fold_slots, fold_tokens


@triton.jit
def _tile(
    first_query,
    last_query,
    row,
    begin,
    context,
    request,
    query_ptr,
    stride_query_token,
    stride_query_head,
    key_ptr,
    stride_key_token,
    stride_key_head,
    value_ptr,
    stride_value_token,
    stride_value_head,
    out_ptr,
    stride_out_token,
    stride_out_head,
    cache_ptr,
    stride_block,
    stride_head,
    stride_token,
    heads_ptr,
    table_ptr,
    stride_row,
    sink,
    recent,
    ring,
    scale,
    sinks_ptr,
    STREAMING: tl.constexpr,
    SINKS: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BUFFERS: tl.constexpr,
):
    """Attention of the queries at positions ``first_query`` to ``last_query - 1`` in one head."""
    head = tl.load(heads_ptr + row).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    query_position = first_query + m // GROUP
    used = (query_position < last_query) & (m < BLOCK_M // GROUP * GROUP)
    token = (begin + query_position - context).to(tl.int64)
    query_head = head * GROUP + m % GROUP
    mask = used[:, None] & (d < HEAD)[None, :]
    q_at = query_ptr + token * stride_query_token + query_head * stride_query_head
    q = tl.load(q_at[:, None] + d[None, :], mask=mask, other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    num_slots = context
    band = context
    if STREAMING:
        band = tl.maximum(context, first_query - recent + 1)
        # Once no query reaches back into the context, its sink alone is left to see.
        in_reach = tl.where(band > context, sink, sink + ring)
        num_slots = tl.minimum(context, in_reach)
    top, total, acc = fold_slots(
        q,
        top,
        total,
        acc,
        0,
        tl.cdiv(num_slots, BLOCK_N),
        num_slots,
        context,
        first_query,
        query_position,
        cache_ptr + row.to(tl.int64) * stride_head,
        stride_block,
        stride_token,
        table_ptr + request.to(tl.int64) * stride_row,
        sink,
        recent,
        ring,
        scale,
        STREAMING,
        PAGE,
        HEAD,
        BLOCK_N,
        BLOCK_D,
        BUFFERS,
    )
    chunk_key = key_ptr + begin.to(tl.int64) * stride_key_token + head * stride_key_head
    chunk_value = value_ptr + begin.to(tl.int64) * stride_value_token + head * stride_value_head
    if STREAMING:
        top, total, acc = fold_tokens(
            q,
            top,
            total,
            acc,
            context,
            tl.minimum(sink, band),
            context,
            query_position,
            chunk_key,
            stride_key_token,
            chunk_value,
            stride_value_token,
            sink,
            recent,
            scale,
            STREAMING,
            HEAD,
            BLOCK_N,
            BLOCK_D,
            BUFFERS,
        )
    top, total, acc = fold_tokens(
        q,
        top,
        total,
        acc,
        band,
        last_query,
        context,
        query_position,
        chunk_key,
        stride_key_token,
        chunk_value,
        stride_value_token,
        sink,
        recent,
        scale,
        STREAMING,
        HEAD,
        BLOCK_N,
        BLOCK_D,
        BUFFERS,
    )
    if SINKS:
        total = add_sinks(total, top, sinks_ptr, query_head, used)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    at = out_ptr + token * stride_out_token + query_head * stride_out_head
    tl.store(at[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _prefill(
    query_ptr,
    stride_query_token,
    stride_query_head,
    key_ptr,
    stride_key_token,
    stride_key_head,
    value_ptr,
    stride_value_token,
    stride_value_head,
    out_ptr,
    stride_out_token,
    stride_out_head,
    start_ptr,
    len_ptr,
    num_reqs,
    r_cache,
    r_stride_block,
    r_stride_head,
    r_stride_token,
    r_heads,
    r_table,
    r_stride_row,
    s_cache,
    s_stride_block,
    s_stride_head,
    s_stride_token,
    s_heads,
    s_table,
    s_stride_row,
    sink,
    recent,
    ring,
    scale,
    sinks_ptr,
    R_COUNT: tl.constexpr,
    R_PAGE: tl.constexpr,
    S_COUNT: tl.constexpr,
    S_PAGE: tl.constexpr,
    SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BUFFERS: tl.constexpr,
):
    """Retrieval heads first, and a request's last tiles first: the longest work starts first."""
    QUERIES: tl.constexpr = BLOCK_M // GROUP
    row = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    b = tl.arange(0, BLOCK_B)
    inside = b < num_reqs
    base = tl.load(start_ptr)
    firsts = (tl.load(start_ptr + b, mask=inside, other=0) - base) // QUERIES + b
    request = tl.sum((inside & (firsts <= tile)).to(tl.int32), axis=0) - 1
    begin = tl.load(start_ptr + request)
    length = tl.load(start_ptr + request + 1) - begin
    context = tl.load(len_ptr + request) - length
    offset = (tile - ((begin - base) // QUERIES + request)) * QUERIES
    if offset < length:
        first_query = context + offset
        last_query = context + tl.minimum(offset + QUERIES, length)
        if R_COUNT > 0:
            if row < R_COUNT:
                _tile(
                    first_query,
                    last_query,
                    row,
                    begin,
                    context,
                    request,
                    query_ptr,
                    stride_query_token,
                    stride_query_head,
                    key_ptr,
                    stride_key_token,
                    stride_key_head,
                    value_ptr,
                    stride_value_token,
                    stride_value_head,
                    out_ptr,
                    stride_out_token,
                    stride_out_head,
                    r_cache,
                    r_stride_block,
                    r_stride_head,
                    r_stride_token,
                    r_heads,
                    r_table,
                    r_stride_row,
                    sink,
                    recent,
                    ring,
                    scale,
                    sinks_ptr,
                    False,
                    SINKS,
                    R_PAGE,
                    GROUP,
                    HEAD,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    BUFFERS,
                )
        if S_COUNT > 0:
            if row >= R_COUNT:
                _tile(
                    first_query,
                    last_query,
                    row - R_COUNT,
                    begin,
                    context,
                    request,
                    query_ptr,
                    stride_query_token,
                    stride_query_head,
                    key_ptr,
                    stride_key_token,
                    stride_key_head,
                    value_ptr,
                    stride_value_token,
                    stride_value_head,
                    out_ptr,
                    stride_out_token,
                    stride_out_head,
                    s_cache,
                    s_stride_block,
                    s_stride_head,
                    s_stride_token,
                    s_heads,
                    s_table,
                    s_stride_row,
                    sink,
                    recent,
                    ring,
                    scale,
                    sinks_ptr,
                    True,
                    SINKS,
                    S_PAGE,
                    GROUP,
                    HEAD,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_D,
                    BUFFERS,
                )


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
    *,
    retrieval: bool = True,
) -> None:
    """See ``vllm_duo.ops.prefill``.

    Args:
        query: [T, Hq, D].
        key: [T, Hkv, D].
        value: [T, Hkv, D].
        heads: the layer's head classes.
        caches: read only.
        batch: the step's requests.
        scale: factor on the logits.
        output: [T, Hq, D], mutated in place.
        sinks: [Hq] float32, or None.
        retrieval: False where another kernel serves the retrieval heads.

    Raises:
        ValueError: a tensor is not contiguous in its last dimension.
    """
    tokens = batch.num_tokens - batch.num_decode_tokens
    num_reqs = batch.num_reqs - batch.num_decodes
    of_retrieval, of_streaming = gpu.class_arguments(heads, caches, key, retrieval=retrieval)
    num_rows = of_retrieval.count + of_streaming.count
    if tokens == 0 or num_rows == 0:
        return
    gpu.check_rows(query=query, key=key, value=value, output=output)
    sink, recent, ring = gpu.ring_sizes(caches)
    head_size = key.shape[-1]
    group = query.shape[1] // heads.num_kv_heads
    block_m = gpu.block(group, 64)
    tiling = gpu.tiling(head_size, key.element_size(), key.device)
    first = batch.num_decodes
    _prefill[(num_rows, tokens // (block_m // group) + num_reqs)](
        query,
        *query.stride()[:2],
        key,
        *key.stride()[:2],
        value,
        *value.stride()[:2],
        output,
        *output.stride()[:2],
        batch.query_start_loc[first:],
        batch.seq_lens[first:],
        num_reqs,
        *gpu.rows_from(of_retrieval, first).pointers(),
        *gpu.rows_from(of_streaming, first).pointers(),
        sink,
        recent,
        ring,
        scale * math.log2(math.e),
        query if sinks is None else sinks,
        R_COUNT=of_retrieval.count,
        R_PAGE=of_retrieval.page,
        S_COUNT=of_streaming.count,
        S_PAGE=of_streaming.page,
        SINKS=sinks is not None,
        GROUP=group,
        HEAD=head_size,
        BLOCK_M=block_m,
        BLOCK_N=tiling.tokens,
        BLOCK_D=gpu.block(head_size, 16),
        BLOCK_B=gpu.block(num_reqs),
        BUFFERS=tiling.buffers,
        num_warps=tiling.warps,
    )
