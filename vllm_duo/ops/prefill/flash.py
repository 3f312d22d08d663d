"""Prefill of the retrieval heads by FlashAttention's paged call, over strided views of our caches."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vllm_duo.ops import gpu
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches
from vllm_duo.ops.prefill.retrieval import gather_queries, scatter_results


def retrieval_prefill(
    query: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
    scale: float,
    output: torch.Tensor,
    *,
    flash_attn_varlen_func: Callable[..., torch.Tensor],
    fa_version: int,
) -> None:
    """Serve the retrieval heads of all requests after the first ``num_decodes``.

    Args:
        query: [T, Hq, D].
        heads: the layer's head classes.
        caches: read only; the retrieval cache holds the step's own tokens already.
        batch: the step's requests; lengths on the host may be upper bounds.
        scale: factor on the logits.
        output: [T, Hq, D], mutated in place at these requests' tokens and heads.
        flash_attn_varlen_func: vLLM's (``vllm.vllm_flash_attn``).
        fa_version: 2, 3 or 4.

    Source: the paged call of ``vllm/v1/attention/backends/flash_attn.py``, 0.32.
    """
    cache, paged = caches.retrieval, caches.paged
    if cache is None or paged is None:
        return
    first = batch.num_decodes
    keys, values = cache.transpose(1, 2).chunk(2, dim=-1)  # [N, P, R, D], strided
    starts = batch.memo(
        ("starts", first),
        lambda: batch.query_start_loc[first:] - batch.query_start_loc[first],
    )
    result = flash_attn_varlen_func(
        q=gather_queries(query, heads, batch),
        k=keys,
        v=values,
        cu_seqlens_q=starts,
        max_seqlen_q=gpu.longest_query(batch, first, batch.num_reqs),
        seqused_k=batch.seq_lens[first:],
        max_seqlen_k=int(batch.host_seq_lens[first:].max()),
        softmax_scale=scale,
        causal=True,
        block_table=paged.block_table[first : batch.num_reqs],
        fa_version=fa_version,
    )
    scatter_results(result, heads, batch, output)
