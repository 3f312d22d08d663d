"""Triton kernel of ``write_kv``: one launch for both classes.

A program copies ``BLOCK_T`` tokens of one KV head. The grid depends on the rows of ``key`` alone,
padding included, so CUDA graphs can keep it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_duo.ops import gpu
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches
from vllm_duo.ops.triton_tools import requests_of, slot_of

MAX_TOKENS = 32
"""Tokens of a program at most."""


@triton.jit
def _copy(
    row,
    token,
    slot,
    request,
    kept,
    key_ptr,
    stride_key_token,
    stride_key_head,
    value_ptr,
    stride_value_token,
    stride_value_head,
    cache_ptr,
    stride_block,
    stride_head,
    stride_token,
    heads_ptr,
    table_ptr,
    stride_row,
    PAGE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy the ``kept`` tokens [BLOCK_T] of a class's head to their slots; block 0 gets nothing."""
    d = tl.arange(0, BLOCK_D)
    head = tl.load(heads_ptr + row).to(tl.int64)
    column = table_ptr + request.to(tl.int64) * stride_row + slot // PAGE
    block = tl.load(column, mask=kept, other=0).to(tl.int64)
    mask = (block > 0)[:, None] & (d < HEAD)[None, :]
    from_key = key_ptr + token * stride_key_token + head * stride_key_head
    from_value = value_ptr + token * stride_value_token + head * stride_value_head
    at = cache_ptr + block * stride_block + row.to(tl.int64) * stride_head
    at += (slot % PAGE).to(tl.int64) * stride_token
    k = tl.load(from_key[:, None] + d[None, :], mask=mask)
    v = tl.load(from_value[:, None] + d[None, :], mask=mask)
    tl.store(at[:, None] + d[None, :], k, mask=mask)
    tl.store(at[:, None] + HEAD + d[None, :], v, mask=mask)


@triton.jit
def _write_kv(
    key_ptr,
    stride_key_token,
    stride_key_head,
    value_ptr,
    stride_value_token,
    stride_value_head,
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
    ring,
    R_COUNT: tl.constexpr,
    R_PAGE: tl.constexpr,
    S_COUNT: tl.constexpr,
    S_PAGE: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = tl.program_id(1)
    request = requests_of(start_ptr, token, num_reqs, BLOCK_B)
    real = request < num_reqs
    end = tl.load(start_ptr + request + 1, mask=real, other=0)
    seq_len = tl.load(len_ptr + request, mask=real, other=0)
    position = seq_len - end + token
    token = token.to(tl.int64)
    if R_COUNT > 0:
        if row < R_COUNT:
            _copy(
                row,
                token,
                position,
                request,
                real,
                key_ptr,
                stride_key_token,
                stride_key_head,
                value_ptr,
                stride_value_token,
                stride_value_head,
                r_cache,
                r_stride_block,
                r_stride_head,
                r_stride_token,
                r_heads,
                r_table,
                r_stride_row,
                R_PAGE,
                HEAD,
                BLOCK_D,
            )
    if S_COUNT > 0:
        if row >= R_COUNT:
            # Of two tokens with one slot only the later may be written: drop what is overtaken.
            kept = real & ((position < sink) | (position >= seq_len - ring))
            _copy(
                row - R_COUNT,
                token,
                slot_of(position, sink, ring),
                request,
                kept,
                key_ptr,
                stride_key_token,
                stride_key_head,
                value_ptr,
                stride_value_token,
                stride_value_head,
                s_cache,
                s_stride_block,
                s_stride_head,
                s_stride_token,
                s_heads,
                s_table,
                s_stride_row,
                S_PAGE,
                HEAD,
                BLOCK_D,
            )


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
) -> None:
    """See ``vllm_duo.ops.write_kv``."""
    _launch(key, value, heads, caches, batch, retrieval=True, streaming=True)


def write_retrieval(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
) -> None:
    """See ``vllm_duo.ops.write_kv``."""
    _launch(key, value, heads, caches, batch, retrieval=True, streaming=False)


def write_streaming(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
) -> None:
    """See ``vllm_duo.ops.write_kv``."""
    _launch(key, value, heads, caches, batch, retrieval=False, streaming=True)


def _launch(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
    *,
    retrieval: bool,
    streaming: bool,
) -> None:
    of_retrieval, of_streaming = gpu.class_arguments(
        heads, caches, key, retrieval=retrieval, streaming=streaming
    )
    rows = of_retrieval.count + of_streaming.count
    if rows == 0 or len(key) == 0:
        return
    gpu.check_rows(key=key, value=value)
    sink, _, ring = gpu.ring_sizes(caches)
    head_size = key.shape[-1]
    block_t = min(gpu.block(len(key)), MAX_TOKENS)
    _write_kv[(triton.cdiv(len(key), block_t), rows)](
        key,
        *key.stride()[:2],
        value,
        *value.stride()[:2],
        batch.query_start_loc,
        batch.seq_lens,
        batch.num_reqs,
        *of_retrieval.pointers(),
        *of_streaming.pointers(),
        sink,
        ring,
        R_COUNT=of_retrieval.count,
        R_PAGE=of_retrieval.page,
        S_COUNT=of_streaming.count,
        S_PAGE=of_streaming.page,
        HEAD=head_size,
        BLOCK_T=block_t,
        BLOCK_D=gpu.block(head_size),
        BLOCK_B=gpu.block(batch.num_reqs),
    )
