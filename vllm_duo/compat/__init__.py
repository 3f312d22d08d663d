"""Patches of vLLM: one file per symbol, each says symptom, why, exact condition, when it may go."""

from __future__ import annotations


def install() -> None:
    """Arrange every patch; safe to call again, and cheap: heavy modules are patched as they load."""
    from vllm_duo.compat import (
        cpu_platform,
        kv_cache_groups,
        scheduler_stats,
        slot_mapping,
        spec_registry,
        stat_loggers,
    )
    from vllm_duo.compat.after_import import after_import

    cpu_platform.patch()
    after_import("vllm.v1.core.single_type_kv_cache_manager", spec_registry.patch)
    after_import(kv_cache_groups.module_name(), kv_cache_groups.patch)
    after_import("vllm.v1.core.sched.scheduler", scheduler_stats.patch)
    after_import("vllm.v1.metrics.loggers", stat_loggers.patch)
    after_import("vllm.v1.worker.gpu_model_runner", slot_mapping.patch)
