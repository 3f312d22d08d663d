"""``vllm-duo doctor``: whether this machine can serve with duo."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)

STYLES = {"ok": "green", "info": "cyan", "failed": "bold red"}


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Check versions, platform, kernels and plugin, and test the operators for a few seconds.

    The exit code is 1 if anything failed.
    """
    import json
    import os
    from dataclasses import asdict

    from rich.table import Table
    from rich.text import Text

    from vllm_duo.cli.consoles import err, out

    # vLLM's start-up lines would stand between ours; an explicit setting wins.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_duo.doctor.checks import check_all

    with err.status("Looking at vLLM, the plugin and the operators ..."):
        findings = check_all()
    failed = sum(found.status == "failed" for found in findings)
    if as_json:
        document = {"failed": failed, "findings": [asdict(found) for found in findings]}
        typer.echo(json.dumps(document, indent=2))
    else:
        table = Table("", "", "")
        for found in findings:
            mark = Text(found.status, style=STYLES[found.status])
            table.add_row(Text(found.topic), mark, Text(found.detail))
        out.print(table)
        told = f"{failed} of {len(findings)} checks failed" if failed else "Ready to serve with duo"
        out.print(Text(told, style=STYLES["failed" if failed else "ok"]))
    if failed:
        raise typer.Exit(1)
