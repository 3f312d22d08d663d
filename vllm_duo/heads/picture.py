"""Head patterns as pictures: a heatmap in the terminal, and the same as a file.

L is the number of layers (rows), Hkv the number of KV heads of a layer (columns).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from rich.text import Text

from vllm_duo.heads.pattern import HeadPattern, HeadSelection

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panel = tuple[str, npt.NDArray[np.float64], HeadSelection | None]
"""Title, [L, Hkv] values from 0 to 1, and the selection to mark."""
CELL = "██"
DIGITS = "0123456789"
COLOURS = (
    *((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141)),
    *((39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37)),
)
"""Viridis at nine points: even in lightness, and so readable without colour vision."""


def rgb_of(value: float) -> str:
    """Colour of a value in [0, 1], clipped, as rich and CSS write it."""
    place = min(max(value, 0.0), 1.0) * (len(COLOURS) - 1)
    low = min(int(place), len(COLOURS) - 2)
    share = place - low
    mixed = (
        round(a + (b - a) * share) for a, b in zip(COLOURS[low], COLOURS[low + 1], strict=True)
    )
    return "rgb({},{},{})".format(*mixed)


def heatmap(
    values: npt.NDArray[np.float64], *, marks: npt.NDArray[np.bool_] | None, coloured: bool
) -> Text:
    """A row a layer, a cell a head.

    Args:
        values: [L, Hkv], 0 to 1.
        marks: [L, Hkv], true where a head is named a retrieval head; None: no marks.
        coloured: with colours; without, a cell is the value's first decimal, 1 as 9.
    """
    text = Text()
    for layer, row in enumerate(values):
        text.append(f"{layer:>4} ")
        for head, value in enumerate(row):
            marked = marks is not None and bool(marks[layer, head])
            if coloured:
                text.append(CELL, style=rgb_of(float(value)))
            else:
                text.append(DIGITS[min(int(np.clip(value, 0, 1) * 10), 9)])
            text.append("*" if marked else " ")
        text.append("\n")
    return text


def legend(coloured: bool) -> Text:
    """What the cells of ``heatmap`` mean."""
    if not coloured:
        return Text("0 to 9: tenths of the value; * a retrieval head at this cut")
    text = Text("0 ")
    for step in range(11):
        text.append(CELL, style=rgb_of(step / 10))
    return text.append(" 1   * a retrieval head at this cut")


def draw(pattern: HeadPattern, selection: HeadSelection | None, title: str, file: Path) -> None:
    """Write the heatmap to a file, the selection's retrieval heads marked.

    Raises:
        ValueError: the file has another ending or no folder.
        RuntimeError: matplotlib is not installed.
    """
    draw_panels([(title, np.clip(pattern.values, 0, 1), selection)], file)


def draw_png(pattern: HeadPattern, selection: HeadSelection | None, title: str) -> bytes:
    """What ``draw`` writes to a .png file."""
    from vllm_duo.figures import png_of

    return png_of(_figure_of([(title, np.clip(pattern.values, 0, 1), selection)]))


def draw_panels(panels: list[Panel], file: Path) -> None:
    """Write heatmaps of one shape side by side.

    Args:
        panels: what is drawn.
        file: .png, .svg or .pdf.

    Raises:
        ValueError: the file has another ending or no folder.
        RuntimeError: matplotlib is not installed.
    """
    from vllm_duo.figures import check_figure_file, save_figure

    check_figure_file(file)
    save_figure(_figure_of(panels), file)


def _figure_of(panels: list[Panel]) -> Figure:
    from matplotlib.figure import Figure

    layers, heads = panels[0][1].shape
    width = len(panels) * min(2.4 + 0.22 * heads, 9.0)
    figure = Figure(figsize=(width, min(1.6 + 0.18 * layers, 12.0)), layout="constrained")
    for axes, (title, values, selection) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        image = axes.imshow(values, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        if selection is not None:
            rows, columns = np.nonzero(selection.retrieval)
            axes.scatter(columns, rows, s=6, color="white", edgecolors="black", linewidths=0.4)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("KV head")
        axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="value")
    return figure
