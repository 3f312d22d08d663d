"""Masks split over ranks and stages, and their layouts."""

from __future__ import annotations

from vllm_duo import HeadPattern
from vllm_duo.config import DuoConfig, resolve
from vllm_duo.heads.discovery import PUBLISHED
from vllm_duo.kv_cache.layout import KVShape, Layout, plan_layout
from vllm_duo.kv_cache.ranks import stage_sizes
from vllm_duo.server_plan import ServerPlan

TOKENS = 32_768
# Layers by KV heads, true for a retrieval head; two ranks have the left and the right half.
APART = [[1, 1, 0, 0]] * 3  # rank 0 retrieves, rank 1 streams
EXCHANGED = [[1, 1, 0, 0], [0, 0, 1, 1]]
NO_STREAMING_ON_0 = [[1, 1, 0, 1], [1, 1, 0, 0]]
MIXED = [[1, 0, 0, 1], [1, 0, 1, 0]]
MASKS = {
    "apart": APART,
    "exchanged": EXCHANGED,
    "no streaming on rank 0": NO_STREAMING_ON_0,
    "mixed": MIXED,
    "exclusive": [[0] * 4, [1] * 4, [0] * 4],
    "all streaming": [[0] * 4] * 2,
    "all retrieval": [[1] * 4] * 2,
    "one head": [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]],
}
BY_STAGE = [[0] * 4, [0] * 4, [1] * 4, [1] * 4]


def split(
    mask,
    ranks: int = 2,
    *,
    stages=None,
    block_size: int = 16,
    draft_bytes: int = 0,
    drafts: int = 0,
) -> Layout:
    shapes = KVShape.split(
        [[bool(head) for head in layer] for layer in mask],
        head_size=16,
        dtype_bytes=4,
        tensor_parallel_size=ranks,
        stage_sizes=stages,
        draft_token_bytes=draft_bytes,
    )
    return plan_layout(
        shapes, block_size=block_size, sink_size=16, recent_size=32, draft_size=drafts
    )


def published(
    name: str, ranks: int, *, stages: int = 1, balance: bool = False, block_size: int = 128
):
    """A shipped pattern's plan at 50 %, and its layout in bf16."""
    pattern = HeadPattern.load(PUBLISHED / name)
    sizes = stage_sizes(pattern.num_layers, stages) if stages > 1 else ()
    plan = ServerPlan(pattern, resolve(DuoConfig(balance=balance), pattern, ranks), ranks, sizes)
    shape = {"head_size": 128, "dtype_bytes": 2, "max_model_len": TOKENS}
    return plan, plan.layout(block_size=block_size, **shape)
