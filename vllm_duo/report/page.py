"""What the page is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table; ``style`` is a class of the page, ``colour`` its background."""

    text: str
    style: str = ""
    colour: str = ""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A chart, or a table."""

    title: str
    chart: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """One result's part of the page."""

    heading: str
    file: str
    settings: str
    blocks: Sequence[Block]
    notes: Sequence[str] = field(default=())


def row(*texts: str) -> list[Cell]:
    """Cells of plain text."""
    return [Cell(text=text) for text in texts]
