"""The page's charts and heatmaps as files of their own, for papers and slides."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from vllm_duo.report.grid import GridCell, grid_chart
from vllm_duo.report.page import Block, Section
from vllm_duo.report.style import LIGHT, rules_in_light

KINDS = ("svg", "png")
FONTS = "Liberation Sans, Arial, Helvetica, sans-serif"
PNG_SCALE = 3.0
"""1,920 pixels across."""
NAME_LENGTH = 60


def write_figures(
    sections: Sequence[Section], folder: Path, kinds: Iterable[str] = ("svg",)
) -> list[Path]:
    """Write every chart and every table with coloured cells; tables of plain figures stay on the page.

    Args:
        sections: the page's.
        folder: made if it is missing. Files are called by place and title.
        kinds: of ``KINDS``.

    Returns:
        The files.

    Raises:
        ValueError: another kind, or no figure in the results.
        RuntimeError: PNG asked for and vl-convert-python is not installed.
        OSError: a file cannot be written.
    """
    chosen = tuple(dict.fromkeys(kinds))
    if unknown := [kind for kind in chosen if kind not in KINDS]:
        raise ValueError(
            f"figures as {', '.join(unknown)}: expected {' or '.join(KINDS)}: change --figure-kinds"
        )
    figures = list(_figures(sections))
    if not figures:
        raise ValueError(
            "figures: these results have nothing to draw, only tables: leave --figures out"
        )
    makers: dict[str, Callable[[str], bytes]] = {"svg": str.encode, "png": _png}
    made = {
        folder / f"{name}.{kind}": makers[kind](svg) for name, svg in figures for kind in chosen
    }
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in made.items():
        file.write_bytes(content)
    return list(made)


def _figures(sections: Sequence[Section]) -> Iterator[tuple[str, str]]:
    """Name and SVG document of each figure."""
    number = 0
    for section in sections:
        for block in section.blocks:
            chart = block.chart or _heatmap(block)
            if chart:
                number += 1
                words = re.sub(r"[^a-z0-9]+", "-", block.title.lower())[:NAME_LENGTH].strip("-")
                yield f"{number:02}-{words}", standalone(chart)


def _heatmap(block: Block) -> str:
    """A table's coloured cells as a chart; "" where there are none."""
    if not any(cell.colour for row in block.rows for cell in row):
        return ""
    return grid_chart(
        block.title,
        [row[0].text for row in block.rows],
        block.columns[1:],
        [[GridCell(colour=cell.colour, text=cell.text) for cell in row[1:]] for row in block.rows],
    )


def standalone(chart: str) -> str:
    """A chart of the page as an SVG document that brings its own colours, on white."""
    root = ElementTree.fromstring(chart)
    _, _, width, height = root.attrib["viewBox"].split()
    root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "width": width, "height": height}
    rules = ElementTree.Element("style")
    rules.text = f"svg text {{ font-family: {FONTS}; }}\n{rules_in_light()}"
    back = ElementTree.Element("rect", {"width": "100%", "height": "100%", "fill": LIGHT["back"]})
    title = root.find("title")
    root.insert(0 if title is None else 1, rules)
    root.insert(list(root).index(rules) + 1, back)
    return ElementTree.tostring(root, encoding="unicode")


def _png(svg: str) -> bytes:
    try:
        import vl_convert
    except ImportError:
        raise RuntimeError(
            "PNG figures need vl-convert-python, which is not installed: pip install "
            "'vllm-duo[report]', or ask for --figure-kinds svg"
        ) from None
    return bytes(vl_convert.svg_to_png(svg, scale=PNG_SCALE))
