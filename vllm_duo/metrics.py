"""Prometheus metrics of both head classes on vLLM's ``/metrics``, prefix ``vllm_duo:``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import StatLoggerBase

from vllm_duo.compat.scheduler_stats import COUNTERS, PREFIX
from vllm_duo.server_plan import resolve_plan

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

CLASSES = ("retrieval", "streaming")


COUNTER_TEXTS = {
    "streaming_prefix_hits": "Requests that resumed at a snapshot of streaming state",
    "streaming_prefix_hit_tokens": "Tokens at which requests resumed, by snapshots",
    "streaming_snapshots": "Snapshots of streaming state stored",
}


def _known(name: str) -> Any:
    """The default registry's metric of that name: they are made once per process."""
    from prometheus_client import REGISTRY

    return getattr(REGISTRY, "_names_to_collectors", {}).get(name)


def _gauge(name: str, text: str, labels: list[str]) -> Gauge:
    from prometheus_client import Gauge

    known: Gauge | None = _known(name)
    return known or Gauge(name, text, labels, multiprocess_mode="mostrecent")


def _counter(name: str, text: str) -> Counter:
    from prometheus_client import Counter

    known: Counter | None = _known(name)
    return known or Counter(name, text, ["engine"])


class DuoStatLogger(StatLoggerBase):
    """Publishes what the scheduler reports of the two classes."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self.engine = str(engine_index)
        plan = resolve_plan(vllm_config)
        self.held_blocks = _gauge(
            f"{PREFIX}held_blocks", "Pool blocks held by requests", ["engine", "class"]
        )
        self.held_bytes = _gauge(
            f"{PREFIX}held_bytes", "Bytes of the pool blocks held by requests", ["engine", "class"]
        )
        self.pool_blocks = _gauge(f"{PREFIX}pool_blocks", "Blocks of the pool", ["engine"])
        self.block_bytes = _gauge(f"{PREFIX}block_bytes", "Bytes of one pool block", ["engine"])
        self.waste = _gauge(
            f"{PREFIX}pool_waste",
            "Share of the held bytes that the rule does not need, last blocks' rests excluded",
            ["engine"],
        )
        self.counters = {
            name: _counter(PREFIX + name, text).labels(self.engine)
            for name, text in COUNTER_TEXTS.items()
        }
        # What the engine counted so far; a new engine counts from 0.
        self._last = dict.fromkeys(COUNTERS, 0)
        self.waste.labels(self.engine).set(0)
        for name in CLASSES:
            self.held_blocks.labels(self.engine, name).set(0)
            self.held_bytes.labels(self.engine, name).set(0)
        resolved = plan.resolved
        info = _gauge(
            f"{PREFIX}info",
            "Head pattern and settings in force",
            [
                "engine",
                "pattern",
                "sparsity",
                "mask_hash",
                "sink_size",
                "recent_size",
                "streaming_cache_dtype",
            ],
        )
        for labels in [key for key in info._metrics if key[0] == self.engine]:
            info.remove(*labels)  # of an earlier engine in this process
        info.labels(
            self.engine,
            plan.pattern_name,
            f"{resolved.selection.sparsity:.4f}",
            resolved.selection.mask_hash,
            str(resolved.sink_size),
            str(resolved.recent_size),
            resolved.streaming_cache_dtype,
        ).set(1)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Publish one step's counts."""
        if scheduler_stats is None:
            return
        stages = scheduler_stats.num_kv_fetch_reqs_by_stage
        # Taken out again: vLLM's own loggers, which run after a plugin's, log the stages of KV fetches
        # as soon as any count is not 0.
        counts = {key: stages.pop(key) for key in list(stages) if key.startswith(PREFIX)}
        block_bytes = counts.get(f"{PREFIX}block_bytes")
        if block_bytes is None:
            return
        self.block_bytes.labels(self.engine).set(block_bytes)
        self.pool_blocks.labels(self.engine).set(counts[f"{PREFIX}pool_blocks"])
        for name in CLASSES:
            blocks = counts[f"{PREFIX}{name}_blocks"]
            self.held_blocks.labels(self.engine, name).set(blocks)
            self.held_bytes.labels(self.engine, name).set(blocks * block_bytes)

        self.waste.labels(self.engine).set(counts[f"{PREFIX}waste_ppm"] / 1e6)
        for name, counter in self.counters.items():
            total = counts[PREFIX + name]
            counter.inc(total - self._last[name])
            self._last[name] = total

    def log_engine_initialized(self) -> None:
        """Nothing to add to the start-up log."""
