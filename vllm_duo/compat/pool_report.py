"""``Scheduler.__init__``: what runs is what was planned, and one log line says what it holds.

Symptom: groups that differ from the planned ones would still serve, with more blocks a request than
the plan and the start-up figures say.
Why: vLLM forms the groups and sizes the pool in the engine core, after the front end has planned.
Condition: a group is of streaming heads.
May go: never; this is a check, put where vLLM has just decided.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_duo.drafts import Drafts, is_drafting_layer
from vllm_duo.kv_cache.capacity import Capacity
from vllm_duo.kv_cache.formats import row_bytes
from vllm_duo.kv_cache.rank_caches import rank_block_bytes, rank_caches
from vllm_duo.logging import get_logger

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_duo.kv_cache.layout import Layout
    from vllm_duo.server_plan import ServerPlan

logger = get_logger(__name__)

LAYOUT = "duo_layout"
"""Attribute of vLLM's ``Scheduler``: its ``Layout``; None without streaming heads."""


def patch(module: ModuleType) -> None:
    """Wrap the constructor.

    Args:
        module: ``vllm.v1.core.sched.scheduler``.
    """
    original = module.Scheduler.__init__

    @wraps(original)
    def __init__(
        self: Any, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any
    ) -> None:
        layout = check_and_report(vllm_config, kv_cache_config)
        original(self, vllm_config, kv_cache_config, *args, **kwargs)
        setattr(self, LAYOUT, layout)

    module.Scheduler.__init__ = __init__


def check_and_report(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Layout | None:
    """Hold vLLM's groups and pool against the plan, and log what fits.

    Args:
        vllm_config: the server's.
        kv_cache_config: what vLLM made of the layers' specs, the first rank's.

    Returns:
        The plan, of all ranks; None for a model without streaming heads.

    Raises:
        RuntimeError: the groups or the block's bytes are not the planned ones.
    """
    from vllm.v1.kv_cache_interface import iter_layer_specs

    from vllm_duo.kv_cache.spec import StreamingSpec
    from vllm_duo.server_plan import resolve_plan

    specs = [
        spec
        for group in kv_cache_config.kv_cache_groups
        for spec in iter_layer_specs(group.kv_cache_spec)
        if isinstance(spec, StreamingSpec)
    ]
    if not specs:
        return None
    spec = specs[0]
    plan = resolve_plan(vllm_config)
    # --max-model-len auto shortens it after the specs were made, which may have been cut to it.
    sizes = [size for each in specs for size in (each.sink_size, each.recent_size)]
    longest = max(vllm_config.model_config.max_model_len, *sizes)
    drafts = Drafts.of(vllm_config)
    layout = plan.layout(
        head_size=spec.head_size,
        dtype_bytes=vllm_config.model_config.dtype.itemsize,
        row_bytes=row_bytes(vllm_config.cache_config.cache_dtype, spec.head_size),
        block_size=spec.block_size,
        max_model_len=longest,
        drafts=drafts,
    )
    check_groups(layout, kv_cache_config)
    max_model_len = vllm_config.model_config.max_model_len
    _report(plan, layout, kv_cache_config.num_blocks, max_model_len)
    if plan.num_ranks > 1:
        cost, balanced = plan.split_costs(layout, max_model_len, drafts)
        logger.info("duo: %s", cost.describe(balanced))
    return layout


def check_groups(layout: Layout, kv_cache_config: KVCacheConfig, rank: int = 0) -> None:
    """Hold vLLM's groups and block bytes on one rank against the layout.

    Raises:
        RuntimeError: they differ.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    block_bytes = rank_block_bytes(layout, rank)
    names = [set(group.layer_names) for group in kv_cache_config.kv_cache_groups]
    num_layers = len(layout.ranks[rank].retrieval_heads)
    drafting = [{name for name in group if is_drafting_layer(name, num_layers)} for group in names]
    expected = [sorted(group) for group in rank_caches(layout, rank).groups]
    groups = [
        sorted(map(extract_layer_index, group - drafters))
        for group, drafters in zip(names, drafting, strict=True)
    ]
    sizes = {
        tensor.size // kv_cache_config.num_blocks for tensor in kv_cache_config.kv_cache_tensors
    }
    # Layers that draft are paged like the retrieval heads, and vLLM looks for them in one group.
    if groups != expected or sizes != {block_bytes} or any(drafting[1:]):
        raise RuntimeError(
            f"vLLM's KV cache groups are not the planned ones: expected layers {expected} in blocks of "
            f"{block_bytes} bytes, got {groups} in blocks of {sorted(sizes)} bytes; another "
            "plugin may change them, else please report it with the server's flags"
        )


def _report(plan: ServerPlan, layout: Layout, num_blocks: int, max_model_len: int) -> None:
    capacity = Capacity(layout=layout, num_blocks=num_blocks)
    logger.info(
        "duo: KV cache: pattern %s, sparsity %.4g, mask %s; blocks of %d retrieval and %s streaming "
        "tokens in %d bin(s), %d bytes; waste %.1f %% at %d tokens; %d blocks hold %d tokens in %.2f "
        "requests of %d tokens, %.2f x stock",
        plan.pattern_name,
        plan.resolved.selection.sparsity,
        plan.resolved.selection.mask_hash,
        layout.block_size,
        " and ".join(str(size) for size in dict.fromkeys(s.block_size for s in layout.spans)),
        len(layout.bins),
        layout.block_bytes,
        100 * layout.waste(max_model_len),
        max_model_len,
        capacity.usable_blocks,
        capacity.tokens_that_fit(max_model_len),
        capacity.concurrent_requests(max_model_len),
        max_model_len,
        capacity.times_stock(max_model_len),
    )
