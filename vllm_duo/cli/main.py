"""Entry point of ``vllm-duo``: the list of commands, and how their errors are told.

A command is a module with ``app``, a ``typer.Typer`` of one command or of several. It is imported only
when it is called, so that ``vllm-duo --help`` is quick whatever the commands import.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from vllm_duo.cli.consoles import err

DEBUG_VARIABLE = "VLLM_DUO_DEBUG"
INPUT_ERROR = 2
"""Exit code of a command that could not do what was asked for."""


@dataclass(frozen=True)
class Command:
    """Where a command lives, and its line in the list of commands."""

    module: str
    help: str


COMMANDS = {
    "plan": Command("vllm_duo.cli.plan", "What a server would hold, from config.json alone."),
    "identify": Command("vllm_duo.cli.identify", "Find a model's retrieval heads."),
    "patterns": Command("vllm_duo.cli.patterns", "List, show, compare and check head patterns."),
    "eval": Command(
        "vllm_duo.cli.evaluate", "What a pattern costs in quality, through vLLM itself."
    ),
    "report": Command(
        "vllm_duo.cli.report", "Results of plan, eval and the serving benchmark as HTML."
    ),
    "doctor": Command("vllm_duo.cli.doctor", "Whether this machine can serve with duo."),
}


class LazyGroup(TyperGroup):
    """Lists ``COMMANDS`` from their lines here; imports the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of ``COMMANDS``."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        """A stand-in with the command's line: enough to list it."""
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(name=cmd_name, help=COMMANDS[cmd_name].help)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` name, imported."""
        name, _, rest = super().resolve_command(ctx, args)
        assert name is not None, "typer has told an unknown command"
        module = importlib.import_module(COMMANDS[name].module)
        command = typer.main.get_command(module.app)
        command.name = name
        return name, command, rest


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"vllm-duo {version('vllm-duo')}")
        raise typer.Exit


@app.callback()
def vllm_duo(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Long contexts in a fraction of the KV memory: plan, find and check head patterns."""


def main() -> None:
    """Run the command of ``sys.argv``; an error of the user's input is told in its own words.

    Exit codes: 0, 2 where the input was at fault, 1 where a check found something, 130 for Ctrl-C.
    With VLLM_DUO_DEBUG=1 errors come with their traceback.
    """
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        app(prog_name="vllm-duo")
    try:
        app(prog_name="vllm-duo")
    except (ValueError, NotImplementedError, RuntimeError, OSError) as error:
        err.print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(INPUT_ERROR)
    except MemoryError as error:
        told = str(error) or "out of memory: an allocation failed"
        err.print(f"Error: {told}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(INPUT_ERROR)
