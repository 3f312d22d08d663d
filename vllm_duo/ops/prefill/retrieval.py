"""What other libraries' kernels share that serve the retrieval heads of prefills on a GPU."""

from __future__ import annotations

import torch

from vllm_duo.ops.batch import Batch, HeadMap


def gather_queries(query: torch.Tensor, heads: HeadMap, batch: Batch) -> torch.Tensor:
    """The prefills' queries of the retrieval heads alone.

    Args:
        query: [T, Hq, D].
        heads: the layer's head classes.
        batch: the step's requests.

    Returns:
        [prefills' tokens, R * Hq / Hkv, D], contiguous.
    """
    tokens = slice(batch.num_decode_tokens, batch.num_tokens)
    return _by_kv_head(query, heads)[tokens, heads.retrieval].flatten(1, 2)


def scatter_results(
    result: torch.Tensor, heads: HeadMap, batch: Batch, output: torch.Tensor
) -> None:
    """Put results where ``gather_queries`` took the queries.

    Args:
        result: [prefills' tokens, R * Hq / Hkv, D].
        heads: the layer's head classes.
        batch: the step's requests.
        output: [T, Hq, D], mutated in place at these tokens and heads.
    """
    tokens = slice(batch.num_decode_tokens, batch.num_tokens)
    picked = result.view(result.shape[0], len(heads.retrieval), -1, result.shape[-1])
    _by_kv_head(output, heads)[tokens, heads.retrieval] = picked


def _by_kv_head(rows: torch.Tensor, heads: HeadMap) -> torch.Tensor:
    """[T, Hkv, Hq / Hkv, D], a view."""
    return rows.view(rows.shape[0], heads.num_kv_heads, -1, rows.shape[-1])
