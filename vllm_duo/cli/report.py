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
        typer.Argument(help="Folders of eval or benchmarks.serve, or JSON files of plan --json."),
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Make one HTML file of results: opens from disk, without a network, light or dark."""
    from vllm_duo.cli.consoles import out as console
    from vllm_duo.report.load import load_results
    from vllm_duo.report.render import render

    page = render(load_results(runs))
    out.write_text(page, encoding="utf-8")
    console.print(f"Saved to {out}", markup=False, highlight=False, soft_wrap=True)
