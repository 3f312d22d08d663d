"""Specs of a layer's caches on this rank, and the server's plan that they come from."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.utils.torch_utils import get_dtype_size, kv_cache_dtype_str_to_dtype
from vllm.v1.kv_cache_interface import get_kv_quant_mode

from vllm_duo.drafts import Drafts
from vllm_duo.kv_cache.formats import row_bytes
from vllm_duo.kv_cache.rank_caches import rank_caches
from vllm_duo.kv_cache.spec import RetrievalSpec, StreamingSpec
from vllm_duo.server_plan import ServerPlan, resolve_plan

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

    from vllm_duo.kv_cache.layout import Layout


class CachedLayer(Protocol):
    """What the specs need of vLLM's ``Attention``."""

    head_size: int
    kv_cache_dtype: str
    kv_cache_torch_dtype: torch.dtype


@dataclass(kw_only=True)
class StandIn:
    """A layer whose cache has the server's format, as that of a layer that is skipped has not."""

    head_size: int
    kv_cache_dtype: str
    kv_cache_torch_dtype: torch.dtype


_plans: dict[int, ServerPlan] = {}


def plan_of(vllm_config: VllmConfig) -> ServerPlan:
    """The server's plan, resolved once per config object and forgotten with it."""
    key = id(vllm_config)
    if key not in _plans:
        _plans[key] = resolve_plan(vllm_config)
        weakref.finalize(vllm_config, _plans.pop, key, None)
    return _plans[key]


def own_rank(plan: ServerPlan) -> int:
    """This process's rank in its tensor-parallel group; without a group, in one process, 0."""
    return 0 if plan.tensor_parallel_size == 1 else int(get_tensor_model_parallel_rank())


def own_stage(plan: ServerPlan) -> int:
    """This process's pipeline stage, from 0."""
    return 0 if plan.pipeline_parallel_size == 1 else int(get_pp_group().rank_in_group)


def retrieval_spec(layer: CachedLayer, heads: int, vllm_config: VllmConfig) -> RetrievalSpec:
    """Spec of a layer's ``heads`` retrieval heads."""
    return RetrievalSpec(
        block_size=vllm_config.cache_config.block_size,
        num_kv_heads=heads,
        head_size=layer.head_size,
        dtype=layer.kv_cache_torch_dtype,
        **_quantised(layer),
    )


def streaming_spec(
    layer: CachedLayer, index: int, heads: int, vllm_config: VllmConfig
) -> StreamingSpec:
    """Spec of the ``heads`` streaming heads of the layer with this index."""
    layout = _layout(layer, vllm_config)
    return _spec_of_bin(layer, layout.bin_of(index), heads, layout, vllm_config)


def unused_spec(
    layer: CachedLayer, group: int, rank: int, vllm_config: VllmConfig
) -> RetrievalSpec | StreamingSpec | None:
    """Spec of the cache by which a layer keeps a group from being empty on a rank, if it is.

    Args:
        layer: the rank's first.
        group: index, as in ``RankCaches.groups``; there may be no such group.
        rank: as in ``Layout.ranks``.
        vllm_config: the server's.
    """
    layout = _layout(layer, vllm_config)
    if group not in rank_caches(layout, rank).unused:
        return None
    cache_dtype = vllm_config.cache_config.cache_dtype
    stand_in = StandIn(
        head_size=layer.head_size,
        kv_cache_dtype=cache_dtype,
        kv_cache_torch_dtype=kv_cache_dtype_str_to_dtype(cache_dtype, vllm_config.model_config),
    )
    if layout.has_retrieval and group == 0:
        return retrieval_spec(stand_in, 1, vllm_config)
    return _spec_of_bin(stand_in, group - layout.has_retrieval, 1, layout, vllm_config)


def _spec_of_bin(
    layer: CachedLayer, bin_index: int, heads: int, layout: Layout, vllm_config: VllmConfig
) -> StreamingSpec:
    span = layout.span_of(bin_index)
    return StreamingSpec(
        block_size=vllm_config.cache_config.block_size,
        slots_per_block=span.block_size,
        num_kv_heads=heads,
        head_size=layer.head_size,
        **_streaming_numbers(layer, vllm_config),
        sink_size=span.sink_size,
        recent_size=span.recent_size,
        draft_size=span.draft_size,
        lookahead_size=vllm_config.num_lookahead_tokens,
        bin=bin_index,
        snapshot_interval=plan_of(vllm_config).resolved.snapshot_interval,
        max_step_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
    )


def _quantised(layer: CachedLayer) -> dict[str, Any]:
    """What vLLM's specs say of a quantised cache: how, and the bytes of a token in one head."""
    content = row_bytes(layer.kv_cache_dtype, layer.head_size)
    if content is None:
        return {}
    return {
        "kv_quant_mode": get_kv_quant_mode(layer.kv_cache_dtype),
        "state_content_bytes": content,
    }


def _streaming_numbers(layer: CachedLayer, vllm_config: VllmConfig) -> dict[str, Any]:
    """What a streaming cache's spec says of its numbers: the retrieval caches', or the model's own."""
    if plan_of(vllm_config).streaming_quantised:
        return {"dtype": layer.kv_cache_torch_dtype, **_quantised(layer)}
    return {"dtype": vllm_config.model_config.dtype}


def _layout(layer: CachedLayer, vllm_config: VllmConfig) -> Layout:
    return plan_of(vllm_config).layout(
        head_size=layer.head_size,
        dtype_bytes=get_dtype_size(vllm_config.model_config.dtype),
        row_bytes=row_bytes(vllm_config.cache_config.cache_dtype, layer.head_size),
        block_size=vllm_config.cache_config.block_size,
        max_model_len=vllm_config.model_config.max_model_len,
        drafts=Drafts.of(vllm_config),
    )
