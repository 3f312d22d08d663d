"""Options in dataclasses: what typer sees, and what the command gets."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Annotated

import typer
from typer.testing import CliRunner

from vllm_duo.cli.option_groups import grouped, option


@dataclass(frozen=True, kw_only=True)
class Sizes:
    width: Annotated[int, option("In dots.", "--width")]
    height: Annotated[int | None, option("In dots.", "--height")] = None


@dataclass(frozen=True, kw_only=True)
class Colours:
    colour: Annotated[str, option("By name.", "--colour")] = "red"
    bright: Annotated[bool, option("Or dull.")] = True


seen = []


@grouped
def draw(name: Annotated[str, typer.Argument()], sizes: Sizes, colours: Colours) -> None:
    """Draw it."""
    seen.append((name, sizes, colours))


def call(*arguments):
    app = typer.Typer()
    app.command()(draw)
    return CliRunner().invoke(app, list(arguments))


def test_each_field_is_an_option():
    assert list(signature(draw).parameters) == ["name", "width", "height", "colour", "bright"]
    assert "Draw it." in call("--help").output


def test_groups_are_filled():
    result = call("it", "--width", "3", "--colour", "blue", "--no-bright")
    assert result.exit_code == 0, result.output
    assert seen.pop() == ("it", Sizes(width=3), Colours(colour="blue", bright=False))


def test_defaults_and_what_is_required():
    assert call("it", "--width", "3").exit_code == 0
    assert seen.pop() == ("it", Sizes(width=3), Colours())
    assert call("it").exit_code == 2
    assert seen == []
