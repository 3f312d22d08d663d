"""Layouts of the shipped patterns."""

from __future__ import annotations

from vllm_duo import HeadPattern
from vllm_duo.heads.discovery import PUBLISHED
from vllm_duo.kv_cache.formats import row_bytes
from vllm_duo.kv_cache.layout import KVShape, Layout, plan_layout
from vllm_duo.kv_cache.ranks import stage_sizes


def published_layout(
    name: str,
    sparsity: float = 0.5,
    *,
    block_size: int = 128,
    dtype_bytes: int = 2,
    ranks: int = 1,
    stages: int = 1,
    balance: bool = False,
    kv_cache_dtype: str = "auto",
    streaming_quantised: bool = True,
) -> Layout:
    """Head size 128, sink 64, recent 256; what is left out is as README and docs tell of it.

    Args:
        name: of the shipped pattern.
        sparsity: share of its KV heads that stream.
        block_size: tokens of a retrieval block.
        dtype_bytes: of a number of the model's own.
        ranks: of a stage.
        stages: of a pipeline.
        balance: whether every rank streams the same share of its heads.
        kv_cache_dtype: vLLM's.
        streaming_quantised: whether it is the streaming heads', too.
    """
    selection = HeadPattern.load(PUBLISHED / name).select(
        sparsity=sparsity, balance_ranks=ranks if balance else 1
    )
    shapes = KVShape.split(
        selection.retrieval.tolist(),
        head_size=128,
        dtype_bytes=dtype_bytes,
        row_bytes=row_bytes(kv_cache_dtype, 128),
        streaming_quantised=streaming_quantised,
        tensor_parallel_size=ranks,
        stage_sizes=stage_sizes(selection.num_layers, stages),
    )
    return plan_layout(shapes, block_size=block_size, sink_size=64, recent_size=256)
