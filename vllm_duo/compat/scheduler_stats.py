"""``Scheduler.make_stats``: carry the held blocks of each class to the front end.

Symptom: ``/metrics`` knows only the share of blocks in use, not who holds them.
Why: ``SchedulerStats`` travels between processes with fixed fields. Its ``dict[str, int]`` field
``num_kv_fetch_reqs_by_stage`` is read by vLLM for known stages only; our stat logger runs before
vLLM's and takes our keys out again.
Condition: one of the groups is of streaming heads. Read back by ``vllm_duo.metrics``.
May go: once a plugin can add fields to the scheduler's statistics.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

PREFIX = "vllm_duo:"


def patch(module: ModuleType) -> None:
    """Wrap the method.

    Args:
        module: ``vllm.v1.core.sched.scheduler``.
    """
    original = module.Scheduler.make_stats

    @wraps(original)
    def make_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
        stats = original(self, *args, **kwargs)
        if stats is not None:
            stats.num_kv_fetch_reqs_by_stage.update(held_blocks(self.kv_cache_manager))
        return stats

    module.Scheduler.make_stats = make_stats


def held_blocks(kv_cache_manager: Any) -> dict[str, int]:
    """Blocks that running requests hold by class, and the pool's size.

    Args:
        kv_cache_manager: vLLM's ``KVCacheManager``.

    Returns:
        Counts under ``vllm_duo:`` keys; empty for a model without streaming heads.
    """
    from vllm_duo.kv_cache.manager import RingManager

    managers = kv_cache_manager.coordinator.single_type_managers
    if not any(isinstance(manager, RingManager) for manager in managers):
        return {}
    held = {"retrieval": 0, "streaming": 0}
    for manager in managers:
        if isinstance(manager, RingManager):
            held["streaming"] += manager.allocator.held_blocks()
        else:
            held["retrieval"] += sum(map(len, manager.req_to_blocks.values()))
    config = kv_cache_manager.kv_cache_config
    block_bytes = config.kv_cache_tensors[0].size // config.num_blocks
    return {
        f"{PREFIX}retrieval_blocks": held["retrieval"],
        f"{PREFIX}streaming_blocks": held["streaming"],
        f"{PREFIX}block_bytes": block_bytes,
        # The pool's null block is never handed out.
        f"{PREFIX}pool_blocks": config.num_blocks - 1,
    }
