"""What /metrics says while a point runs: sampled gauges, and counters before and after."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_duo.report.serve_results import ServerCounts

GAUGES = {
    "vllm:kv_cache_usage_perc": "peak_kv_share",
    "vllm:num_requests_running": "peak_running",
    "vllm:num_requests_waiting": "peak_waiting",
}
COUNTERS = {
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prefix_cache_queries_total": "prefix_queried_tokens",
    "vllm:prefix_cache_hits_total": "prefix_hit_tokens",
}
CAPACITY = re.compile(r"KV cache size: ([\d,]+) tokens")
CONCURRENCY = re.compile(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One look at /metrics; values of all engines of a server are added up, shares averaged."""

    values: dict[str, float]


def read_sample(text: str) -> Sample:
    """Parse the metrics that are used here.

    Raises:
        RuntimeError: one of them is missing.
    """
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in GAUGES or sample.name in COUNTERS:
                found.setdefault(sample.name, []).append(sample.value)
    missing = [name for name in (*GAUGES, *COUNTERS) if name not in found]
    if missing:
        raise RuntimeError(
            f"/metrics: expected {', '.join(missing)}, found none: this vLLM names its metrics "
            "differently, or the server runs with --disable-log-stats"
        )
    values = {name: sum(values) for name, values in found.items()}
    share = "vllm:kv_cache_usage_perc"
    values[share] /= len(found[share])
    return Sample(values=values)


def counts(samples: Sequence[Sample]) -> ServerCounts:
    """Peaks of the gauges, and growth of the counters from the first sample to the last."""
    first, last = samples[0].values, samples[-1].values
    peaks = {key: max(sample.values[name] for sample in samples) for name, key in GAUGES.items()}
    grown = {key: int(last[name] - first[name]) for name, key in COUNTERS.items()}
    return ServerCounts(
        samples=len(samples),
        peak_kv_share=peaks["peak_kv_share"],
        peak_running=int(peaks["peak_running"]),
        peak_waiting=int(peaks["peak_waiting"]),
        **grown,
    )


def capacity(log: str) -> tuple[int | None, int | None, float | None]:
    """What vLLM logs at start: tokens that the pool holds, length and number of longest requests."""
    size, many = CAPACITY.search(log), CONCURRENCY.search(log)
    return (
        int(size[1].replace(",", "")) if size else None,
        int(many[1].replace(",", "")) if many else None,
        float(many[2]) if many else None,
    )
