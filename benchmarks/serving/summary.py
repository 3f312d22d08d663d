"""From the client's raw samples to the figures of a run, and of a point over its rounds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.settings import STOCK, Settings
from benchmarks.serving.workloads import Request
from vllm_duo.evaluate.passkey import first_number
from vllm_duo.report.serve_results import PointResults, Quantiles, Run, SideAtPoint, Spread

KINDS = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")


def samples_ms(raw: dict[str, Any]) -> dict[str, list[float]]:
    """The four latencies of every request, as vLLM's client defines them.

    Args:
        raw: results of ``vllm bench serve --save-detailed``, in seconds.
    """
    tpot = [
        (latency - ttft) / (tokens - 1)
        for latency, ttft, tokens in zip(
            raw["latencies"], raw["ttfts"], raw["output_lens"], strict=True
        )
        if tokens > 1
    ]
    seconds = {
        "ttft_ms": raw["ttfts"],
        "tpot_ms": tpot,
        "itl_ms": [gap for gaps in raw["itls"] for gap in gaps],
        "e2e_ms": raw["latencies"],
    }
    return {kind: [1000 * value for value in values] for kind, values in seconds.items()}


def quantiles(samples: Sequence[float]) -> Quantiles:
    """Of at least one sample; with none (one output token has no gaps) all are 0 of 0 samples."""
    if not samples:
        return Quantiles(median=0, p95=0, p99=0, mean=0, samples=0)
    median, p95, p99 = (float(value) for value in np.percentile(samples, (50, 95, 99)))
    return Quantiles(
        median=median, p95=p95, p99=p99, mean=float(np.mean(samples)), samples=len(samples)
    )


def spread(values: Sequence[float]) -> Spread:
    """Of at least one round."""
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def right_passkeys(requests: Sequence[Request], texts: Sequence[str]) -> int:
    """Pass-key requests whose answer is right; the client keeps the order of its dataset."""
    return sum(
        request.answer == first_number(text)
        for request, text in zip(requests, texts, strict=True)
        if request.answer
    )


def point_results(
    settings: Settings, runs: Iterable[Run], folder: Path, judged: bool
) -> list[PointResults]:
    """All points, in order; points and sides without a run are left out."""
    by_place: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        by_place.setdefault((run.point, run.side), []).append(run)
    made = []
    for point in settings.points:
        stock = {run.round: run for run in by_place.get((point.key, STOCK), [])}
        sides = [
            _side(by_place[point.key, side], stock, folder, judged)
            for side in settings.sides
            if (point.key, side) in by_place
        ]
        if sides:
            made.append(PointResults(key=point.key, sides=sides, **point.model_dump()))
    return made


def _side(runs: Sequence[Run], stock: dict[int, Run], folder: Path, judged: bool) -> SideAtPoint:
    pooled: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for run in runs:
        raw = json.loads((folder / run.client_file).read_text())
        for kind, values in samples_ms(raw).items():
            pooled[kind] += values
    queried = sum(run.server.prefix_queried_tokens for run in runs)
    hits = sum(run.server.prefix_hit_tokens for run in runs)
    ratios = [
        run.output_tokens_per_s / stock[run.round].output_tokens_per_s
        for run in runs
        if run.round in stock
    ]
    side = runs[0].side
    return SideAtPoint(
        side=side,
        rounds=len(runs),
        output_tokens_per_s=spread([run.output_tokens_per_s for run in runs]),
        total_tokens_per_s=spread([run.total_tokens_per_s for run in runs]),
        **{kind: quantiles(values) for kind, values in pooled.items()},
        median_tpot_ms=spread([run.tpot_ms.median for run in runs]),
        median_ttft_ms=spread([run.ttft_ms.median for run in runs]),
        peak_kv_share=max(run.server.peak_kv_share for run in runs),
        peak_running=max(run.server.peak_running for run in runs),
        preemptions=sum(run.server.preemptions for run in runs),
        prefix_hit_rate=hits / queried if queried else None,
        passkeys_asked=sum(run.passkeys_asked for run in runs) if judged else 0,
        passkeys_right=sum(run.passkeys_right for run in runs) if judged else 0,
        times_stock_output=spread(ratios) if side != STOCK and ratios else None,
    )
