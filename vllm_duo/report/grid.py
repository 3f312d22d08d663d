"""Grids of coloured cells as inline SVG: patterns, and tables of scores for papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from vllm_duo.report.svg import WIDTH, add_text, new_chart

LEFT, RIGHT, TOP, LEGEND = 72, 16, 28, 34
MAX_CELL_WIDTH = 72.0
LABEL_WIDTH = 28
"""Column names nearer than this would run into each other; the ones between are left out."""


@dataclass(frozen=True, kw_only=True)
class GridCell:
    """One cell.

    Attributes:
        colour: fills it; "": none.
        text: stands in it.
        told: shown beside the pointer.
        marked: with a dot in the middle.
    """

    colour: str = ""
    text: str = ""
    told: str = ""
    marked: bool = False


def grid_chart(
    title: str,
    row_names: Sequence[str],
    column_names: Sequence[str],
    cells: Sequence[Sequence[GridCell]],
    *,
    row_height: int = 24,
    legend: Sequence[GridCell] = (),
) -> str:
    """An SVG element.

    Args:
        title: read out in place of the picture.
        row_names: to the left.
        column_names: above; some are left out where they are close.
        cells: a row for each row name, a cell for each column name.
        row_height: in pixels.
        legend: cells below the grid.

    Raises:
        ValueError: no cells, or others than the names say.
    """
    if not (row_names and column_names) or [len(row) for row in cells] != (
        [len(column_names)] * len(row_names)
    ):
        raise ValueError(
            f"chart {title!r}: expected {len(row_names)} rows of {len(column_names)} cells, at least "
            "one"
        )
    width = min((WIDTH - LEFT - RIGHT) / len(column_names), MAX_CELL_WIDTH)
    bottom = TOP + row_height * len(row_names)
    root = new_chart(title, bottom + (LEGEND if legend else 8))
    every = -(-LABEL_WIDTH // max(int(width), 1))
    for column, name in enumerate(column_names):
        if column % every == 0:
            add_text(root, LEFT + width * (column + 0.5), TOP - 8, name, "middle")
    for index, (name, row) in enumerate(zip(row_names, cells, strict=True)):
        top = TOP + row_height * index
        add_text(root, LEFT - 8, top + row_height / 2 + 4, name, "end")
        for column, cell in enumerate(row):
            _add_cell(root, cell, (LEFT + width * column, top), (width, row_height))
    for index, cell in enumerate(legend):
        _add_cell(root, cell, (LEFT + 36 * index, bottom + 12), (36, 16))
    return ElementTree.tostring(root, encoding="unicode")


def _add_cell(
    root: ElementTree.Element,
    cell: GridCell,
    corner: tuple[float, float],
    size: tuple[float, float],
) -> None:
    (x, y), (width, height) = corner, size
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
    shape = ElementTree.SubElement(root, "rect", {"fill": cell.colour or "none", **place})
    if cell.told:
        ElementTree.SubElement(shape, "title").text = cell.told
    if cell.marked:
        middle = {"cx": f"{x + width / 2:.1f}", "cy": f"{y + height / 2:.1f}", "r": "3"}
        ElementTree.SubElement(root, "circle", {"class": "mark", **middle})
    if cell.text:
        add_text(root, x + width / 2, y + height / 2 + 4, cell.text, "middle")
        if cell.colour:
            root[-1].set("class", "on-colour")
