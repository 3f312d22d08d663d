"""Triton kernels of ``decode``: split KV for both classes in one launch, then a merge.

A *tile* is ``BLOCK_N`` slots of one KV head: as many bytes in either class. The step's tiles are shared
out so that no program gets more than ``share`` of them: a head of a long context is split, a streaming
head is mostly one program of a few tiles. Every program works its place out from the device's own
``query_start_loc`` and ``seq_lens`` (one vector each), so there is no plan to upload, no host
synchronisation, and the grid depends only on the number of requests: CUDA graphs can keep it.
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
def _splits(
    start_ptr,
    len_ptr,
    num_reqs,
    slots,
    programs,
    R_COUNT: tl.constexpr,
    S_COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """[BLOCK_B] splits of each request's retrieval heads and of its streaming heads.

    An empty request has none. At most ``programs`` tiles' worth of splits, and one more a head.
    """
    b = tl.arange(0, BLOCK_B)
    inside = b < num_reqs
    begin = tl.load(start_ptr + b, mask=inside, other=0)
    end = tl.load(start_ptr + b + 1, mask=inside, other=0)
    context = tl.load(len_ptr + b, mask=inside, other=0) - (end - begin)
    live = end > begin
    r_tiles = tl.where(live, tl.maximum(tl.cdiv(context, BLOCK_N), 1), 0)
    s_tiles = tl.where(live, tl.maximum(tl.cdiv(tl.minimum(context, slots), BLOCK_N), 1), 0)
    work = R_COUNT * tl.sum(r_tiles, axis=0) + S_COUNT * tl.sum(s_tiles, axis=0)
    share = tl.maximum(tl.cdiv(work, programs), MIN_TILES)
    return tl.cdiv(r_tiles, share), tl.cdiv(s_tiles, share)


@triton.jit
def _locate(item, splits, COUNT: tl.constexpr, BLOCK_B: tl.constexpr):
    """Of a class's ``item``-th program: request, head row, split, splits of the request, partial.

    ``partial`` counts the splits, over all requests before, of heads that have more than one.
    """
    b = tl.arange(0, BLOCK_B)
    ends = tl.cumsum(splits, axis=0) * COUNT
    request = tl.sum((ends <= item).to(tl.int32), axis=0)
    before = b < request
    first = tl.sum(tl.where(before, splits, 0), axis=0) * COUNT
    count = tl.sum(tl.where(b == request, splits, 0), axis=0)
    partial = tl.sum(tl.where(before & (splits > 1), splits, 0), axis=0) * COUNT
    row = (item - first) // tl.maximum(count, 1)
    return request, row, (item - first) % tl.maximum(count, 1), count, partial


@triton.jit
def _attend(
    item,
    splits,
    partial_base,
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
    acc_ptr,
    lse_ptr,
    sinks_ptr,
    STREAMING: tl.constexpr,
    SINKS: tl.constexpr,
    COUNT: tl.constexpr,
    PAGE: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BUFFERS: tl.constexpr,
):
    """One split of one head: to the output if it is the only one, else to the workspace."""
    request, row, split, count, partial = _locate(item, splits, COUNT, BLOCK_B)
    begin = tl.load(start_ptr + request)
    length = tl.load(start_ptr + request + 1) - begin
    context = tl.load(len_ptr + request) - length
    head = tl.load(heads_ptr + row).to(tl.int64)

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    used = m < length * GROUP
    query_position = context + m // GROUP
    query_token = (begin + m // GROUP).to(tl.int64)
    query_head = head * GROUP + m % GROUP
    mask = used[:, None] & (d < HEAD)[None, :]
    q_at = query_ptr + query_token * stride_query_token + query_head * stride_query_head
    q = tl.load(q_at[:, None] + d[None, :], mask=mask, other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    num_slots = context
    if STREAMING:
        num_slots = tl.minimum(context, sink + ring)
    tiles = tl.maximum(tl.cdiv(num_slots, BLOCK_N), 1)
    part = tl.cdiv(tiles, count)
    top, total, acc = fold_slots(
        q,
        top,
        total,
        acc,
        split * part,
        tl.minimum((split + 1) * part, tiles),
        num_slots,
        context,
        context,
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
    # The step's own tokens belong to the last split; one tile, so nothing is to run ahead.
    low = tl.where(split == count - 1, context, context + length)
    chunk = begin.to(tl.int64)
    top, total, acc = fold_tokens(
        q,
        top,
        total,
        acc,
        low,
        context + length,
        context,
        query_position,
        key_ptr + chunk * stride_key_token + head * stride_key_head,
        stride_key_token,
        value_ptr + chunk * stride_value_token + head * stride_value_head,
        stride_value_token,
        sink,
        recent,
        scale,
        STREAMING,
        HEAD,
        BLOCK_C,
        BLOCK_D,
        0,
    )
    if SINKS:
        if count == 1:
            total = add_sinks(total, top, sinks_ptr, query_head, used)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if count == 1:
        at = out_ptr + query_token * stride_out_token + query_head * stride_out_head
        tl.store(at[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        slot = (partial_base + partial + row * count + split).to(tl.int64) * BLOCK_M + m
        tl.store(acc_ptr + (slot * HEAD)[:, None] + d[None, :], acc, mask=mask)
        tl.store(lse_ptr + slot, top + tl.log2(total), mask=used)


@triton.jit
def _decode(
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
    programs,
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
    acc_ptr,
    lse_ptr,
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
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BUFFERS: tl.constexpr,
):
    """Retrieval splits first: the longest work starts first."""
    item = tl.program_id(0)
    r_splits, s_splits = _splits(
        start_ptr,
        len_ptr,
        num_reqs,
        sink + ring,
        programs,
        R_COUNT,
        S_COUNT,
        BLOCK_N,
        MIN_TILES,
        BLOCK_B,
    )
    r_items = tl.sum(r_splits, axis=0) * R_COUNT
    s_items = tl.sum(s_splits, axis=0) * S_COUNT
    if R_COUNT > 0:
        if item < r_items:
            _attend(
                item,
                r_splits,
                0,
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
                acc_ptr,
                lse_ptr,
                sinks_ptr,
                False,
                SINKS,
                R_COUNT,
                R_PAGE,
                GROUP,
                HEAD,
                BLOCK_M,
                BLOCK_N,
                BLOCK_C,
                BLOCK_D,
                BLOCK_B,
                BUFFERS,
            )
    if S_COUNT > 0:
        if (item >= r_items) & (item < r_items + s_items):
            _attend(
                item - r_items,
                s_splits,
                tl.sum(tl.where(r_splits > 1, r_splits, 0), axis=0) * R_COUNT,
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
                acc_ptr,
                lse_ptr,
                sinks_ptr,
                True,
                SINKS,
                S_COUNT,
                S_PAGE,
                GROUP,
                HEAD,
                BLOCK_M,
                BLOCK_N,
                BLOCK_C,
                BLOCK_D,
                BLOCK_B,
                BUFFERS,
            )


@triton.jit
def _merge(
    out_ptr,
    stride_out_token,
    stride_out_head,
    start_ptr,
    len_ptr,
    num_reqs,
    programs,
    r_heads,
    s_heads,
    slots,
    acc_ptr,
    lse_ptr,
    sinks_ptr,
    R_COUNT: tl.constexpr,
    S_COUNT: tl.constexpr,
    SINKS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One program a request and KV head, retrieval heads first: weigh its splits by their sums."""
    request = tl.program_id(0)
    row = tl.program_id(1)
    r_splits, s_splits = _splits(
        start_ptr,
        len_ptr,
        num_reqs,
        slots,
        programs,
        R_COUNT,
        S_COUNT,
        BLOCK_N,
        MIN_TILES,
        BLOCK_B,
    )
    b = tl.arange(0, BLOCK_B)
    r_partials = tl.where(r_splits > 1, r_splits, 0)
    s_partials = tl.where(s_splits > 1, s_splits, 0)
    r_before = tl.sum(tl.where(b < request, r_partials, 0), axis=0) * R_COUNT
    s_before = tl.sum(tl.where(b < request, s_partials, 0), axis=0) * S_COUNT
    s_before += tl.sum(r_partials, axis=0) * R_COUNT
    streaming = row >= R_COUNT
    row = tl.where(streaming, row - R_COUNT, row)
    count = tl.sum(tl.where(b == request, tl.where(streaming, s_partials, r_partials), 0), axis=0)
    first = tl.where(streaming, s_before, r_before) + row * count
    if count > 1:
        r_head = tl.load(r_heads + row, mask=row < R_COUNT, other=0)
        s_head = tl.load(s_heads + row, mask=row < S_COUNT, other=0)
        head = tl.where(streaming, s_head, r_head).to(tl.int64)
        begin = tl.load(start_ptr + request)
        length = tl.load(start_ptr + request + 1) - begin
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        used = m < length * GROUP
        mask = used[:, None] & (d < HEAD)[None, :]
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for split in range(0, count):
            slot = (first + split).to(tl.int64) * BLOCK_M + m
            lse = tl.load(lse_ptr + slot, mask=used, other=float("-inf"))
            part = tl.load(acc_ptr + (slot * HEAD)[:, None] + d[None, :], mask=mask, other=0.0)
            new_top = tl.maximum(top, lse)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            decay = tl.exp2(top - base)
            weight = tl.exp2(lse - base)
            total = total * decay + weight
            acc = acc * decay[:, None] + part * weight[:, None]
            top = new_top
        query_head = head * GROUP + m % GROUP
        if SINKS:
            total = add_sinks(total, top, sinks_ptr, query_head, used)
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        token = (begin + m // GROUP).to(tl.int64)
        at = out_ptr + token * stride_out_token + query_head * stride_out_head
        tl.store(at[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


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
    """See ``vllm_duo.ops.decode``; no request's query may be longer than ``gpu.MAX_DECODE_QUERY``.

    Raises:
        ValueError: a query is too long, or a tensor is not contiguous in its last dimension.
    """
    longest = gpu.longest_query(batch, 0, batch.num_decodes)
    if longest == 0:
        return
    if longest > gpu.MAX_DECODE_QUERY:
        raise ValueError(
            f"the decode kernel takes queries of at most {gpu.MAX_DECODE_QUERY} tokens, got {longest}: "
            "let prefill serve longer ones"
        )
    gpu.check_rows(query=query, key=key, value=value, output=output)
    of_retrieval, of_streaming = gpu.class_arguments(heads, caches, key)
    sink, recent, ring = gpu.ring_sizes(caches)
    head_size = key.shape[-1]
    group = query.shape[1] // heads.num_kv_heads
    programs = gpu.num_programs(key.device)
    block_m = gpu.decode_rows(longest, group)
    tiling = gpu.tiling(head_size, key.element_size(), key.device)
    # A split has less than twice its share of tiles, so partials are fewer than twice the programs.
    acc, lse = gpu.workspace(key.device, 2 * programs * block_m, head_size)
    shared = {
        "R_COUNT": of_retrieval.count,
        "S_COUNT": of_streaming.count,
        "SINKS": sinks is not None,
        "GROUP": group,
        "HEAD": head_size,
        "BLOCK_M": block_m,
        "BLOCK_N": tiling.tokens,
        "BLOCK_D": gpu.block(head_size, 16),
        "MIN_TILES": 2,
        "BLOCK_B": gpu.block(batch.num_decodes),
    }
    out = (output, *output.stride()[:2])
    step = (batch.query_start_loc, batch.seq_lens, batch.num_decodes, programs)
    _decode[(programs + batch.num_decodes * heads.num_kv_heads,)](
        query,
        *query.stride()[:2],
        key,
        *key.stride()[:2],
        value,
        *value.stride()[:2],
        *out,
        *step,
        *of_retrieval.pointers(),
        *of_streaming.pointers(),
        sink,
        recent,
        ring,
        scale * math.log2(math.e),
        acc,
        lse,
        query if sinks is None else sinks,
        R_PAGE=of_retrieval.page,
        S_PAGE=of_streaming.page,
        BLOCK_C=gpu.block(gpu.MAX_DECODE_QUERY, 16),
        BUFFERS=tiling.buffers,
        num_warps=tiling.warps,
        **shared,
    )
    _merge[(batch.num_decodes, heads.num_kv_heads)](
        *out,
        *step,
        of_retrieval.heads,
        of_streaming.heads,
        sink + ring,
        acc,
        lse,
        query if sinks is None else sinks,
        num_warps=4,
        **shared,
    )
