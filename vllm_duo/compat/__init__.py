"""Patches of vLLM: one file per symbol, each says symptom, why, exact condition, when it may go."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType


def install() -> None:
    """Arrange every patch; safe to call again, and cheap: heavy modules are patched as they load."""
    from vllm_duo.compat import (
        cache_events,
        coordinator,
        cpu_platform,
        draft_count,
        kv_cache_groups,
        model_runner,
        pool_report,
        preempted_pages,
        ray_nodes,
        reloaded_weights,
        scheduler_stats,
        slot_mapping,
        snapshot_orders,
        spec_registry,
        stat_loggers,
        worker_specs,
    )
    from vllm_duo.compat.after_import import after_import

    cpu_platform.patch()
    after_import("vllm.config.vllm", model_runner.patch)
    after_import("vllm.v1.core.single_type_kv_cache_manager", spec_registry.patch)
    after_import(kv_cache_groups.module_name(), kv_cache_groups.patch)
    after_import("vllm.v1.core.kv_cache_manager", coordinator.patch)
    after_import("vllm.v1.core.block_pool", cache_events.patch_pool)
    after_import("vllm.v1.core.kv_cache_coordinator", cache_events.patch_coordinator)
    after_import(
        "vllm.v1.core.sched.scheduler",
        _all(
            pool_report.patch,
            scheduler_stats.patch,
            preempted_pages.patch,
            snapshot_orders.patch_scheduler,
            draft_count.patch,
        ),
    )
    after_import("vllm.v1.engine.core", reloaded_weights.patch)
    after_import("vllm.v1.metrics.loggers", stat_loggers.patch)
    after_import("vllm.v1.executor.abstract", worker_specs.patch)
    after_import("vllm.v1.executor.ray_executor", ray_nodes.patch_v1)
    after_import("vllm.v1.executor.ray_executor_v2", ray_nodes.patch_v2)
    after_import(
        "vllm.v1.worker.gpu_model_runner", _all(slot_mapping.patch, snapshot_orders.patch_runner)
    )
    after_import("vllm.v1.worker.gpu.model_runner", snapshot_orders.patch_runner_v2)


def _all(*patches: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """One patch of a module out of several."""

    def patch(module: ModuleType) -> None:
        for each in patches:
            each(module)

    return patch
