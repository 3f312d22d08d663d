"""``Scheduler.make_stats``: carry what each class holds, wastes and hits to the front end.

Symptom: ``/metrics`` knows only the share of blocks in use, not who holds them.
Why: ``SchedulerStats`` travels between processes with fixed fields. Its ``dict[str, int]`` field
``num_kv_fetch_reqs_by_stage`` is read by vLLM for known stages only; our stat logger runs before
vLLM's and takes our keys out again.
Condition: one of the groups is of streaming heads. Read back by ``vllm_duo.metrics``.
May go: once a plugin can add fields to the scheduler's statistics.
"""

from __future__ import annotations

from functools import wraps
from time import monotonic
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_duo.compat.pool_report import LAYOUT

if TYPE_CHECKING:
    from vllm_duo.kv_cache.layout import Layout

PREFIX = "vllm_duo:"
COUNTERS = ("streaming_prefix_hits", "streaming_prefix_hit_tokens", "streaming_snapshots")
"""Names of what only grows, as ``/metrics`` has them."""
WASTE_SECONDS = 1.0
"""The pool's waste takes some microseconds a request to find, so not every step does."""
LAST_WASTE = "duo_last_waste"
NEVER = (float("-inf"), 0)


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
            counts = held_blocks(self.kv_cache_manager)
            if counts:
                counts[f"{PREFIX}block_bytes"] = getattr(self, LAYOUT).block_bytes
                counts |= streaming_hits(self.kv_cache_manager)
                counts[f"{PREFIX}waste_ppm"] = pool_waste_ppm(self)
            stats.num_kv_fetch_reqs_by_stage.update(counts)
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
    return {
        f"{PREFIX}retrieval_blocks": held["retrieval"],
        f"{PREFIX}streaming_blocks": held["streaming"],
        # The pool's null block is never handed out.
        f"{PREFIX}pool_blocks": kv_cache_manager.kv_cache_config.num_blocks - 1,
    }


def streaming_hits(kv_cache_manager: Any) -> dict[str, int]:
    """What later requests have resumed at, since the server's start.

    Args:
        kv_cache_manager: vLLM's ``KVCacheManager``, with streaming heads.

    Returns:
        Counts under ``vllm_duo:`` keys: requests that resumed at a snapshot of streaming state, their
        tokens, and snapshots stored; all 0 without prefix caching.
    """
    from vllm_duo.kv_cache.snapshot_manager import SnapshotManager

    # Every bin has the same snapshots and hits.
    bins = kv_cache_manager.coordinator.single_type_managers
    manager = next((each for each in bins if isinstance(each, SnapshotManager)), None)
    counts = (0, 0, 0) if manager is None else manager.counts
    return {f"{PREFIX}{name}": count for name, count in zip(COUNTERS, counts, strict=True)}


def pool_waste_ppm(scheduler: Any) -> int:
    """Waste of what the running requests hold now, in millionths; found anew once a second.

    A scheduler that has nothing left to run takes no further step, so its last one says 0: what is
    read while it rests would else be the waste of some request long gone.

    Args:
        scheduler: vLLM's ``Scheduler``, with ``pool_report.LAYOUT``; remembers the last figure.
    """
    if not scheduler.running:
        setattr(scheduler, LAST_WASTE, NEVER)
        return 0
    now = monotonic()
    last, ppm = getattr(scheduler, LAST_WASTE, NEVER)
    if now - last < WASTE_SECONDS:
        return int(ppm)
    layout: Layout = getattr(scheduler, LAYOUT)
    running = [request.num_computed_tokens for request in scheduler.running]
    ppm = round(1e6 * layout.pool_waste(running))
    setattr(scheduler, LAST_WASTE, (now, ppm))
    return ppm
