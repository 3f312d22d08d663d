"""Layouts of the shipped patterns, as README and docs tell of them."""

from __future__ import annotations

from vllm_duo import HeadPattern
from vllm_duo.kv_cache.layout import KVShape, Layout, plan_layout
from vllm_duo.kv_cache.ranks import stage_sizes


def published_layout(folder, sparsity: float) -> Layout:
    """Of a shipped pattern's folder: head size 128 in bf16, blocks of 128, sink 64, recent 256."""
    mask = HeadPattern.load(folder).select(sparsity=sparsity).retrieval
    return plan_layout(
        KVShape(
            retrieval_heads=tuple(int(n) for n in mask.sum(1)),
            streaming_heads=tuple(int(n) for n in (~mask).sum(1)),
            head_size=128,
            dtype_bytes=2,
        ),
        block_size=128,
        sink_size=64,
        recent_size=256,
    )


def published_ranks(folder, ranks: int, *, stages: int = 1, balance: bool = False) -> Layout:
    """The same at 50 % over ranks and stages; ``balance``: every rank streams half of its heads."""
    selection = HeadPattern.load(folder).select(sparsity=0.5, balance_ranks=ranks if balance else 1)
    return plan_layout(
        KVShape.split(
            selection.retrieval.tolist(),
            head_size=128,
            dtype_bytes=2,
            tensor_parallel_size=ranks,
            stage_sizes=stage_sizes(selection.num_layers, stages),
        ),
        block_size=128,
        sink_size=64,
        recent_size=256,
    )
