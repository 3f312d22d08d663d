"""The results of an evaluation as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

STYLES = {"lost": "bold red", "within_noise": "green", "cannot_do": "yellow"}
HEATMAP_TASK = "needle"


def tables(results: dict[str, Any]) -> Iterator[RenderableType]:
    """The verdicts, the needle by depth and length, and perplexity by position."""
    yield _verdicts(results)
    yield from map(Text, notes_on_prompts(results))
    yield from _needles(results)
    if "perplexity" in results:
        yield _perplexity(results["perplexity"])


def notes_on_prompts(results: dict[str, Any]) -> list[str]:
    """Which questions went through the model's chat template; none where no one did."""
    settings, template = results["settings"], results.get("chat_template")
    through = "through the model's chat template"
    if template is not None:
        through += f" (SHA-256 {template})"
    if settings.get("apply_chat_template"):
        unlike = ", texts for perplexity not" if "perplexity" in results else ""
        return [f"Questions were asked {through}{unlike}."]
    if settings.get("suites") and settings.get("suites_chat"):
        return [f"Suites were asked {through}, other questions not."]
    return []


def _verdicts(results: dict[str, Any]) -> Table:
    table = Table("task", "streaming", "full", "duo", "verdict")
    for name, task in results["tasks"].items():
        for length, why in task["skipped_lengths"].items():
            table.add_row(name, "", "", "", Text(f"not at {length} tokens: {why}", style="yellow"))
        for side in task.get("duo", {}).values():
            verdict = side["verdict"]
            told = Text(verdict["told"], style=STYLES[verdict["kind"]])
            scores = (f"{100 * verdict[key]:.1f}" for key in ("full", "duo"))
            table.add_row(name, f"{side['sparsity']:.0%}", *scores, told)
    for side in results.get("perplexity", {}).values():
        told = Text(side["told"], style=STYLES[side["kind"]])
        scores = (f"{side[key]:.3f} nats" for key in ("full_nats", "duo_nats"))
        table.add_row("perplexity", f"{side['sparsity']:.0%}", *scores, told)
    return table


def _needles(results: dict[str, Any]) -> Iterator[Table]:
    """Right answers by depth (rows) and length (columns), of full attention and of each sparsity."""
    task = results["tasks"].get(HEATMAP_TASK, {})
    if "full" not in task:
        return
    sides = {"full attention": task["full"]} | {
        f"{side['sparsity']:.0%} streaming": side for side in task["duo"].values()
    }
    for title, side in sides.items():
        cells = {(c["depth"], c["length"]): c["score"] for c in side["by_depth_and_length"]}
        lengths = sorted({length for _, length in cells})
        table = Table(
            "depth", *(f"{length} tokens" for length in lengths), title=f"needle, {title}"
        )
        for depth in sorted({depth for depth, _ in cells}):
            row = [cells.get((depth, length)) for length in lengths]
            table.add_row(f"{depth:.0%}", *map(_cell, row))
        yield table


def _cell(score: float | None) -> Text:
    if score is None:
        return Text("-")
    style = "green" if score >= 0.9 else "yellow" if score >= 0.5 else "red"
    return Text(f"{score:.0%}", style=style)


def _perplexity(sides: dict[str, Any]) -> Table:
    first = next(iter(sides.values()))
    titles = (f"{part['from']:.0%} to {part['to']:.0%}" for part in first["by_position"])
    table = Table("nats a token", *titles, title="perplexity by position in the text")
    table.add_row("full attention", *(f"{p['full_nats']:.3f}" for p in first["by_position"]))
    for side in sides.values():
        row = (f"{part['duo_nats']:.3f}" for part in side["by_position"])
        table.add_row(f"{side['sparsity']:.0%} streaming", *row)
    return table
