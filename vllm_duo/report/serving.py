"""The part of the page that shows a serving benchmark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from pydantic import ValidationError

from vllm_duo.report.bars import Bar, bar_chart
from vllm_duo.report.curve import Curve, curve_chart
from vllm_duo.report.load import Result
from vllm_duo.report.page import Block, Cell, row
from vllm_duo.report.serve_results import PointResults, ServeResults, SideAtPoint, Spread

STYLES = ("full", "duo", "duo second", "duo third")
LATENCIES = (("ttft_ms", "time to first token"), ("tpot_ms", "time per output token"))
OPEN_LOOP, CLOSED_LOOP = "open loop", "closed loop"
CURVES = "{what}, {loop}: median {latency} (ms) over output tokens/s"
"""Title of a curve, of a latency's words in ``LATENCIES``."""
COLUMNS = (
    "load",
    "side",
    "output tokens/s",
    "times stock",
    "total tokens/s",
    "TTFT, ms",
    "TPOT, ms",
    "ITL, ms",
    "end to end, ms",
    "peak KV",
    "preempted",
    "prefix hits",
    "pass keys",
)


def read(result: Result) -> ServeResults:
    """The file as its schema describes it.

    Raises:
        ValueError: it was written by another version of this program, or holds no finished run.
    """
    try:
        results = ServeResults.model_validate(result.data)
    except ValidationError as error:
        raise ValueError(
            f"{result.file}: expected results of benchmarks.serve, got others: use the version of "
            f"vllm-duo that wrote them\n{error}"
        ) from None
    if not results.points:
        why = "no run was finished" if results.gate.passed else "its correctness gate is red"
        raise ValueError(
            f"{result.file}: expected a benchmark with at least one finished run, found none ({why}): "
            f"see to it, then go on with python -m benchmarks.serve --resume {result.file.parent}"
        )
    return results


def notes(results: ServeResults) -> list[str]:
    """What a reader must know about the figures."""
    told = []
    if not results.complete:
        told.append("The benchmark is not complete: some rounds are missing.")
    if not results.gate.judges_passkeys:
        told.append(
            "Pass keys are not judged: the model does not find them with full attention either."
        )
    return told


def blocks(results: ServeResults) -> Iterator[Block]:
    """Capacity, then for each kind of request its curves and its table."""
    yield from _capacity(results)
    for (workload, tokens, output), group in groupby(
        results.points, key=lambda p: (p.workload, p.prompt_tokens, p.output_tokens)
    ):
        points = list(group)
        what = f"{workload}, {tokens:,} + {output:,} tokens" if tokens else workload
        yield from _curves(what, points)
        yield _table(what, points)


def _style(results_side: str, sides: Sequence[str]) -> str:
    return STYLES[min(sides.index(results_side), len(STYLES) - 1)]


def _capacity(results: ServeResults) -> Iterator[Block]:
    known = [side for side in results.sides if side.kv_tokens is not None]
    if known:
        names = [side.side for side in known]
        title = "Tokens that the KV pool holds (as vLLM logs it at start)"
        bars = [
            Bar(name=side.side, value=float(side.kv_tokens or 0), style=_style(side.side, names))
            for side in known
        ]
        yield Block(title=title, chart=bar_chart(title, bars))


def _curves(what: str, points: Sequence[PointResults]) -> Iterator[Block]:
    """Latency over throughput; open and closed loops are different curves."""
    for loop, name in (("rate", OPEN_LOOP), ("concurrency", CLOSED_LOOP)):
        chosen = [point for point in points if getattr(point, loop) is not None]
        sides = list(dict.fromkeys(side.side for point in chosen for side in point.sides))
        if len(chosen) < 2:
            continue
        chosen.sort(key=lambda point: float(getattr(point, loop)))
        for latency, words in LATENCIES:
            title = CURVES.format(what=what, loop=name, latency=words)
            yield Block(
                title=title,
                chart=curve_chart(
                    title,
                    "output tokens/s",
                    [
                        Curve(
                            name=side,
                            style=_style(side, sides),
                            points=[
                                (found.output_tokens_per_s.median, _median(found, latency), load)
                                for load, found in _of_side(chosen, side)
                            ],
                        )
                        for side in sides
                    ],
                ),
            )


def _of_side(points: Sequence[PointResults], side: str) -> Iterator[tuple[str, SideAtPoint]]:
    for point in points:
        for found in point.sides:
            if found.side == side:
                yield load_of(point), found


def _median(side: SideAtPoint, latency: str) -> float:
    return float(getattr(side, latency).median)


def load_of(point: PointResults) -> str:
    """The load in words."""
    if point.rate is not None:
        return f"{point.rate:g} requests/s"
    return f"{point.concurrency} in flight"


def _table(what: str, points: Sequence[PointResults]) -> Block:
    rows = [[*row(load_of(p), s.side), *_figures(s)] for p in points for s in p.sides]
    title = (
        f"{what}: medians [lowest, highest round]; latencies: median / p95 / p99 of all requests"
    )
    return Block(title=title, columns=COLUMNS, rows=rows)


def _figures(side: SideAtPoint) -> list[Cell]:
    hits, asked = side.prefix_hit_rate, side.passkeys_asked
    return row(
        _spread(side.output_tokens_per_s, ".1f"),
        _spread(side.times_stock_output, ".2f") if side.times_stock_output else "",
        _spread(side.total_tokens_per_s, ".0f"),
        *(
            f"{kind.median:.1f} / {kind.p95:.1f} / {kind.p99:.1f}"
            for kind in (side.ttft_ms, side.tpot_ms, side.itl_ms, side.e2e_ms)
        ),
        f"{side.peak_kv_share:.1%}",
        str(side.preemptions),
        "" if hits is None else f"{hits:.1%}",
        f"{side.passkeys_right} of {asked}" if asked else "",
    )


def _spread(value: Spread, form: str) -> str:
    return f"{value.median:{form}} [{value.low:{form}}, {value.high:{form}}]"
