"""``vllm-duo report``: results as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of eval or benchmarks.serve, JSON files of plan --json, pattern folders."
        ),
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Folder to write each chart and heatmap to, too.")
    ] = None,
    figure_kinds: Annotated[
        str, typer.Option(help="svg, png or both, separated by commas.")
    ] = "svg",
) -> None:
    """Make one HTML file of results: opens from disk, without a network, light or dark."""
    from vllm_duo.cli.consoles import out as console
    from vllm_duo.report.figures import write_figures
    from vllm_duo.report.load import load_results
    from vllm_duo.report.render import render_sections, sections_of

    sections = sections_of(load_results(runs))
    page = render_sections(sections)
    if figures is not None:
        files = write_figures(sections, figures, figure_kinds.split(","))
        told = f"Saved {len(files)} figures to {figures}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    out.write_text(page, encoding="utf-8")
    console.print(f"Saved to {out}", markup=False, highlight=False, soft_wrap=True)
