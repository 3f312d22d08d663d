"""Turns results into the page's tables and charts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_duo.evaluate.report import notes_on_prompts
from vllm_duo.heads import HeadPattern
from vllm_duo.planning.table import size
from vllm_duo.report import pattern, serving, style
from vllm_duo.report.chart import Series, line_chart
from vllm_duo.report.load import Result
from vllm_duo.report.page import Block, Cell, Section, row

TEMPLATE = Path(__file__).with_name("template.html.j2")
TITLE = "vllm-duo report"


def sections_of(results: Sequence[Result]) -> list[Section]:
    """What the page shows of each result, in their order.

    Raises:
        ValueError: results of another version, or none in them.
    """
    makers = {"eval": _eval, "pattern": _pattern, "plan": _plan, "serve": _serve}
    return [makers[result.kind](result) for result in results]


def render(results: Sequence[Result]) -> str:
    """The whole page of results.

    Raises:
        ValueError: results of another version, or none in them.
        RuntimeError: jinja2 is not installed.
    """
    return render_sections(sections_of(results))


def render_sections(sections: Sequence[Section]) -> str:
    """The whole page of what ``sections_of`` found.

    Raises:
        RuntimeError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise RuntimeError(
            "reports need jinja2, which is not installed: pip install 'vllm-duo[report]'"
        ) from None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return str(
        template.render(
            title=TITLE,
            sections=sections,
            light=style.variables(style.LIGHT),
            dark=style.variables(style.DARK),
            chart_rules=style.CHART_RULES,
        )
    )


def _section(result: Result, heading: str, blocks: Iterator[Block], notes: Any = ()) -> Section:
    shown = {key: result.data[key] for key in ("settings", "versions") if key in result.data}
    return Section(
        heading=heading,
        file=result.file.name,
        settings=json.dumps(shown, indent=1),
        blocks=list(blocks),
        notes=notes,
    )


def _serve(result: Result) -> Section:
    results = serving.read(result)
    heading = f"Serving: {results.settings['model']}, stock vLLM and duo under the same load"
    return _section(result, heading, serving.blocks(results), serving.notes(results))


def _pattern(result: Result) -> Section:
    found = HeadPattern.load(result.file.parent)
    return _section(
        result, f"Pattern: {pattern.name_of(result.file.parent)}", pattern.blocks(found)
    )


def _plan(result: Result) -> Section:
    settings = result.data["settings"]
    heading = (
        f"Plan: {settings['model']}, {settings['sparsity']:.0%} streaming, KV pool "
        f"{size(settings['kv_cache_bytes'])}"
    )
    return _section(result, heading, _plan_blocks(result.data), result.data["notes"])


def _plan_blocks(plan: dict[str, Any]) -> Iterator[Block]:
    pairs = list(zip(plan["by_length"], plan["full"]["by_length"], strict=True))
    if all(
        duo["concurrent_requests"] > 0 and full["concurrent_requests"] > 0 for duo, full in pairs
    ):
        yield Block(
            title="Requests that fit at once, by their length in tokens",
            chart=line_chart(
                "Requests that fit at once, by their length in tokens",
                [f"{duo['tokens']:,}" for duo, _ in pairs],
                [
                    Series(
                        name=name,
                        values=[item[side]["concurrent_requests"] for item in pairs],
                        style=name.split()[0],
                    )
                    for side, name in enumerate(("duo", "full attention"))
                ],
                log=True,
            ),
        )
    yield Block(
        title="Capacity",
        columns=("tokens", "duo holds", "full holds", "duo fits", "full fits", "waste"),
        rows=[
            row(
                f"{duo['tokens']:,}",
                size(duo["held_bytes"]),
                size(full["held_bytes"]),
                f"{duo['concurrent_requests']:,.2f}",
                f"{full['concurrent_requests']:,.2f}",
                f"{duo['waste']:.2%}",
            )
            for duo, full in pairs
        ],
    )


def _eval(result: Result) -> Section:
    heading = f"Quality: {result.data['settings']['model']}"
    return _section(result, heading, _eval_blocks(result.data), notes_on_prompts(result.data))


def _eval_blocks(data: dict[str, Any]) -> Iterator[Block]:
    rows = []
    for name, task in data["tasks"].items():
        for side in task.get("duo", {}).values():
            verdict = side["verdict"]
            cells = row(
                name,
                f"{side['sparsity']:.0%}",
                *(f"{100 * verdict[key]:.1f}" for key in ("full", "duo")),
                str(verdict["samples"]),
            )
            rows.append([*cells, Cell(text=verdict["told"], style=f"words {verdict['kind']}")])
        for length, why in task["skipped_lengths"].items():
            told = Cell(text=f"not at {length} tokens: {why}", style="words cannot_do")
            rows.append([*row(name, "", "", "", ""), told])
    columns = ("task", "streaming", "full", "duo", "questions", "verdict")
    yield Block(title="Verdicts", columns=columns, rows=rows)
    for name, task in data["tasks"].items():
        yield from _heatmaps(name, task)
    yield from _perplexity(data.get("perplexity", {}))


def _heatmaps(name: str, task: dict[str, Any]) -> Iterator[Block]:
    """Scores by depth (rows) and length (columns), of every side."""
    if "by_depth_and_length" not in task.get("full", {}):
        return
    sides = [("full attention", task["full"])] + [
        (f"{side['sparsity']:.0%} streaming", side) for side in task["duo"].values()
    ]
    for title, side in sides:
        scores = {(c["depth"], c["length"]): c["score"] for c in side["by_depth_and_length"]}
        lengths = sorted({length for _, length in scores})
        yield Block(
            title=f"{name} by depth and length, {title}",
            columns=("depth", *(f"{length:,} tokens" for length in lengths)),
            rows=[
                [Cell(text=f"{depth:.0%}"), *(_heat(scores.get((depth, n))) for n in lengths)]
                for depth in sorted({depth for depth, _ in scores})
            ],
        )


def _heat(score: float | None) -> Cell:
    """From orange (0) to blue (1), both light enough for black text and told apart by all eyes."""
    if score is None:
        return Cell(text="-")
    low, high = (245, 155, 95), (125, 190, 240)
    mixed = ", ".join(str(round(a + (b - a) * score)) for a, b in zip(low, high, strict=True))
    return Cell(text=f"{score:.0%}", style="cell", colour=f"rgb({mixed})")


def _perplexity(sides: dict[str, Any]) -> Iterator[Block]:
    for side in sides.values():
        streaming = f"{side['sparsity']:.0%} streaming"
        title = f"Perplexity by position, {streaming} (nats a token): {side['told']}"
        parts = side["by_position"]
        yield Block(
            title=title,
            chart=line_chart(
                title,
                [f"{part['from']:.0%} to {part['to']:.0%}" for part in parts],
                [
                    Series(name=name, values=[part[key] for part in parts], style=name.split()[0])
                    for name, key in (("duo", "duo_nats"), ("full attention", "full_nats"))
                ],
            ),
        )
