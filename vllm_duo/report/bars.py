"""Bar charts as inline SVG, in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from vllm_duo.report.svg import WIDTH, add_text, new_chart

BAR_HEIGHT, GAP, LEFT, RIGHT = 28, 12, 110, 110


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar; ``style`` is a class of the page."""

    name: str
    value: float
    style: str


def bar_chart(title: str, bars: Sequence[Bar]) -> str:
    """Horizontal bars from 0, each with its value and how many times the first it is.

    Raises:
        ValueError: no bars, or a value that is no number above 0.
    """
    if not bars or not all(math.isfinite(bar.value) and bar.value > 0 for bar in bars):
        raise ValueError(f"chart {title!r}: expected bars of numbers above 0")
    root = new_chart(title, len(bars) * (BAR_HEIGHT + GAP) + GAP)
    longest = max(bar.value for bar in bars)
    for index, bar in enumerate(bars):
        top = GAP + index * (BAR_HEIGHT + GAP)
        width = (WIDTH - LEFT - RIGHT) * bar.value / longest
        place = {"x": str(LEFT), "y": str(top), "width": f"{width:.1f}", "height": str(BAR_HEIGHT)}
        ElementTree.SubElement(root, "rect", {"class": f"dot {bar.style}", **place})
        middle = top + BAR_HEIGHT / 2 + 4
        add_text(root, LEFT - 8, middle, bar.name, "end")
        times = f" ({bar.value / bars[0].value:.2f} x)" if index else ""
        add_text(root, LEFT + width + 8, middle, f"{bar.value:,.0f}{times}", "start")
    return ElementTree.tostring(root, encoding="unicode")
