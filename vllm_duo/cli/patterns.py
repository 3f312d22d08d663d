"""``vllm-duo patterns``: look at head patterns."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def patterns() -> None:
    """Look at head patterns."""


@app.command("list")
def list_patterns() -> None:
    """List the head patterns that ship with the package."""
    from rich.table import Table

    from vllm_duo.cli.consoles import out
    from vllm_duo.heads import HeadPattern
    from vllm_duo.heads.discovery import PUBLISHED, list_shipped

    table = Table("pattern", "layers", "KV heads")
    for name in list_shipped():
        pattern = HeadPattern.load(PUBLISHED / name)
        table.add_row(name, str(pattern.num_layers), str(pattern.num_kv_heads))
    out.print(table)
