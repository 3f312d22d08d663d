"""``vllm-duo patterns``: look at head patterns, compare and check them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vllm_duo.heads import HeadPattern

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

Pattern = Annotated[str, typer.Argument(help="Folder, or name of a shipped pattern.")]
Figure = Annotated[
    Path | None, typer.Option("--plot", help="Also draw it to this .png, .svg or .pdf.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


@app.callback()
def patterns() -> None:
    """Look at head patterns, compare and check them."""


@app.command("list")
def list_patterns(as_json: Json = False) -> None:
    """List the head patterns that ship with the package."""
    from vllm_duo.heads import HeadPattern
    from vllm_duo.heads.discovery import PUBLISHED, list_shipped

    rows = [
        {
            "pattern": name,
            "layers": pattern.num_layers,
            "kv_heads": pattern.num_kv_heads,
            "mask_hash_at_half": pattern.select(sparsity=0.5).mask_hash,
            "folder": str(PUBLISHED / name),
        }
        for name in list_shipped()
        for pattern in [HeadPattern.load(PUBLISHED / name)]
    ]
    titles = ("pattern", "layers", "KV heads", "mask at 50 %")
    _show(rows, titles, as_json, {"patterns": rows})


@app.command()
def show(
    pattern: Pattern,
    sparsity: Annotated[
        float | None, typer.Option(help="Mark the retrieval heads; default 0.5.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Instead: the value to cut at.")] = None,
    plot: Figure = None,
) -> None:
    """Show a pattern as a heatmap, layers by KV heads, the retrieval heads of a cut marked."""
    from vllm_duo.cli.consoles import out
    from vllm_duo.heads import picture

    found, name = _load(pattern)
    if sparsity is None and threshold is None:
        sparsity = 0.5
    selection = found.select(sparsity=sparsity, threshold=threshold)
    if plot is not None:
        picture.draw(found, selection, name, plot)
    coloured = bool(out.color_system)
    kept = int(selection.retrieval.sum())
    out.print(
        f"{name}: {found.num_layers} layers x {found.num_kv_heads} KV heads; at this cut {kept} of "
        f"{selection.retrieval.size} are retrieval heads, {selection.sparsity:.1%} stream, mask "
        f"{selection.mask_hash}",
        markup=False,
        highlight=False,
    )
    image = picture.heatmap(found.values, marks=selection.retrieval, coloured=coloured)
    out.print(image, no_wrap=True, overflow="ignore", crop=False)
    out.print(picture.legend(coloured))


@app.command()
def diff(
    first: Pattern,
    second: Pattern,
    sparsity: Annotated[str, typer.Option(help="Cuts to compare at.")] = "0.25,0.5,0.75",
    as_json: Json = False,
    plot: Figure = None,
) -> None:
    """Compare two patterns of one model: rank correlation, and overlap at each sparsity.

    Each cut counts the heads that both patterns keep whole, that only one keeps, and that both stream;
    agree is the share in the same class, chance what patterns without any relation would have, IoU the
    retrieval heads of both over those of either. The plot marks the first cut.
    """
    import numpy as np

    from vllm_duo.cli.consoles import out
    from vllm_duo.heads import compare, picture

    (a, name_a), (b, name_b) = _load(first), _load(second)
    compare.check_comparable(a, b)
    cuts = _shares(sparsity)
    found = [compare.overlap(a, b, cut) for cut in cuts]
    rho = compare.rank_correlation(a, b)
    if plot is not None:
        marks = [p.select(sparsity=cuts[0]) for p in (a, b)]
        panels: list[Any] = [
            (f"{name}, marks at {cuts[0]:.0%}", np.clip(p.values, 0, 1), mark)
            for name, p, mark in zip((name_a, name_b), (a, b), marks, strict=True)
        ]
        gap = np.abs(panels[0][1] - panels[1][1])
        picture.draw_panels([*panels, ("difference", gap, None)], plot)
    rows = [
        {
            "sparsity": item.sparsity,
            "both_retrieval": item.both_retrieval,
            "only_first": item.only_first,
            "only_second": item.only_second,
            "both_streaming": item.both_streaming,
            "agreement": round(item.agreement, 4),
            "chance_agreement": round(item.chance_agreement, 4),
            "retrieval_iou": round(item.retrieval_iou, 4),
        }
        for item in found
    ]
    if not as_json:
        told = "not defined, since one has equal values only" if rho is None else f"{rho:.3f}"
        line = f"{name_a} and {name_b}: rank correlation {told}"
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    titles = (
        *("cut", "both keep", "only 1st", "only 2nd", "both stream"),
        *("agree", "chance", "IoU"),
    )
    _show(rows, titles, as_json, {"rank_correlation": rho, "overlap": rows})


@app.command()
def validate(
    pattern: Pattern,
    model: Annotated[
        str | None, typer.Option(help="Check the shape against this model's config.json too.")
    ] = None,
) -> None:
    """Check a pattern folder: its values, its settings and, if told, that it fits a model."""
    from vllm_duo.cli.consoles import out
    from vllm_duo.config import DuoConfig, resolve

    found, name = _load(pattern)
    resolved = resolve(DuoConfig(), found)
    fits = ""
    if model is not None:
        from vllm_duo.planning.checkpoint import read_checkpoint

        facts = read_checkpoint(model).facts
        found.validate_for(facts.num_layers, facts.num_kv_heads, model)
        fits = f", fits {model}"
    out.print(
        f"{name}: valid, {found.num_layers} layers x {found.num_kv_heads} KV heads, sink "
        f"{resolved.sink_size} + recent {resolved.recent_size} tokens ({resolved.sink_source}){fits}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _load(pattern: str) -> tuple[HeadPattern, str]:
    """A pattern and its folder's name."""
    from vllm_duo.heads import HeadPattern
    from vllm_duo.heads.discovery import pattern_folder

    folder = pattern_folder(pattern)
    return HeadPattern.load(folder), folder.absolute().name


def _shares(given: str) -> list[float]:
    """Sparsities of a list as in 0.25,0.5.

    Raises:
        ValueError: one is not a number; ``select`` tells which are out of range.
    """
    try:
        return [float(part) for part in given.split(",")]
    except ValueError:
        raise ValueError(
            f"--sparsity: expected numbers from 0 to 1 as in 0.25,0.5, got {given!r}: correct it"
        ) from None


def _show(
    rows: list[dict[str, Any]], titles: tuple[str, ...], as_json: bool, document: dict[str, Any]
) -> None:
    """A table, or the document as JSON."""
    import json

    from rich.table import Table

    from vllm_duo.cli.consoles import out

    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    table = Table(*titles)
    for row in rows:
        table.add_row(*(str(value) for value in list(row.values())[: len(titles)]))
    out.print(table)
