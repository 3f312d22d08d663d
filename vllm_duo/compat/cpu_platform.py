"""``CpuPlatform``: choose our backend, and validate in the front end.

Symptom: on CPU ``--attention-backend duo`` silently serves with CPU_ATTN, and a bad setting shows up
only as a worker's stack trace.
Why: ``CpuPlatform.get_attn_backend_cls`` always answers CPU_ATTN, and an attention backend has no
hook that runs before the workers start. ``check_and_update_config`` is the last thing that every
front end calls with the whole config.
Condition: the platform is vLLM's CPU platform; both wrappers pass everything on unless the selected
backend is ours.
May go: once the CPU platform honours a registered CUSTOM backend and backends can validate a config.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_duo.drafts import Drafts, draft_model_of, is_made_for_drafts
from vllm_duo.kv_cache.formats import FORMATS
from vllm_duo.logging import get_logger
from vllm_duo.server_plan import BACKEND_PATH, has_duo_section, is_duo, resolve_plan
from vllm_duo.support import check_supported, facts_of, known_limits
from vllm_duo.windows import describe, slides_throughout

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_duo.server_plan import ServerPlan

logger = get_logger(__name__)


def patch() -> None:
    """Wrap the platform class's two methods, whatever the platform; once per process."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    platform = type(current_platform)
    if getattr(platform, "_vllm_duo_patched", False):
        return
    platform._vllm_duo_patched = True
    check_and_update_config = platform.check_and_update_config
    get_attn_backend_cls = platform.get_attn_backend_cls

    @classmethod  # type: ignore[misc]
    def checked(cls: type, vllm_config: VllmConfig) -> None:
        check_and_update_config(vllm_config)
        prepare_server(vllm_config)

    @classmethod  # type: ignore[misc]
    def selected(cls: type, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        ours = selected_backend is AttentionBackendEnum.CUSTOM
        if ours and selected_backend.get_path() == BACKEND_PATH:
            return BACKEND_PATH
        return get_attn_backend_cls(selected_backend, *args, **kwargs)

    platform.check_and_update_config = checked
    if current_platform.is_cpu():
        platform.get_attn_backend_cls = selected


def prepare_server(vllm_config: VllmConfig) -> None:
    """Check a server's config once it is complete; nothing happens where duo was not asked for.

    Raises:
        NotImplementedError: the server uses something that duo does not support.
        ValueError: bad settings, no pattern, or a pattern of another shape.
    """
    if vllm_config.model_config is None or is_made_for_drafts(vllm_config):
        return
    if not is_duo(vllm_config):
        if has_duo_section(vllm_config):
            raise ValueError(
                '--additional-config has a "duo" section, but the attention backend is '
                f"{vllm_config.attention_config.backend}: add --attention-backend duo or remove "
                "the section"
            )
        backend = vllm_config.attention_config.backend
        if backend is not None and backend.name == "CUSTOM":
            path = backend.get_path() if backend.is_overridden() else "nothing"
            logger.warning(
                "the attention backend CUSTOM (alias duo) has been taken by another plugin (%s): "
                "this server does not run vllm-duo",
                path,
            )
        return
    settle_cache_dtype(vllm_config)
    check_supported(vllm_config)
    plan = resolve_plan(vllm_config)
    if draft_model_of(vllm_config) is not None:
        # One platform has one layout of caches, so the layers that draft run duo too; vLLM would
        # choose a backend for them on their own.
        vllm_config.speculative_config.attention_backend = vllm_config.attention_config.backend
    _log_plan(plan, Drafts.of(vllm_config))
    cache_dtype = vllm_config.cache_config.cache_dtype
    if cache_dtype in FORMATS:
        _log_formats(plan, cache_dtype, str(vllm_config.model_config.dtype).removeprefix("torch."))
    for limit in known_limits(vllm_config):
        logger.warning("%s", limit)


def settle_cache_dtype(vllm_config: VllmConfig) -> None:
    """Let a checkpoint's own KV cache take the place of ``auto`` before anything is planned.

    vLLM does the same later, as it builds the first layer: in the workers alone, whose config the
    scheduler's process does not see.
    """
    cache = vllm_config.cache_config
    own = facts_of(vllm_config.model_config).own_cache
    if own.dtype == "auto" or own.problem:
        return
    if cache.cache_dtype == "auto":
        cache.cache_dtype = own.dtype
    text = "duo: the checkpoint asks for a KV cache in %s and brings its scales"
    if cache.cache_dtype in (own.dtype, "fp8", "fp8_e4m3"):
        logger.info(text, own.dtype)
    else:
        logger.info(text + ": not used with --kv-cache-dtype %s", own.dtype, cache.cache_dtype)


def _log_formats(plan: ServerPlan, cache_dtype: str, model_dtype: str) -> None:
    """Say what of a quantised cache keeps the model's numbers."""
    if not plan.streaming_quantised:
        logger.info(
            "duo: retrieval heads keep %s, streaming heads %s (streaming_cache_dtype model)",
            cache_dtype,
            model_dtype,
        )
    if plan.skipped_layers:
        logger.info(
            "duo: layers %s keep %s (--kv-cache-dtype-skip-layers), the others %s",
            ", ".join(map(str, sorted(plan.skipped_layers))),
            model_dtype,
            cache_dtype,
        )


def _log_plan(plan: ServerPlan, drafts: Drafts) -> None:
    """Say which heads stream; ``pool_report`` says what fits once the pool is known."""
    resolved = plan.resolved
    if slides_throughout(plan.windows):
        logger.info(
            "duo: %s of the model's own, so every head streams with no sink and no pattern is used%s",
            describe(plan.windows),
            f"; {drafts.size} slots for drafts" if drafts.size else "",
        )
        return
    logger.info(
        "duo: pattern %s, %s %g (%s): %d of %d KV heads stream (%.1f %%), mask %s, "
        "sink %d + recent %d tokens%s%s",
        plan.pattern_name,
        resolved.cut,
        resolved.cut_value,
        resolved.cut_source,
        (~resolved.selection.retrieval).sum(),
        resolved.selection.retrieval.size,
        100 * resolved.selection.sparsity,
        resolved.selection.mask_hash,
        resolved.sink_size,
        resolved.recent_size,
        f" and {drafts.size} slots for drafts" if drafts.size else "",
        f"; {describe(plan.windows)} of the model's own, with no sink" if plan.windows else "",
    )
