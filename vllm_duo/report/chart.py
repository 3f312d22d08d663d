"""Line charts as inline SVG, in the page's own colours so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from vllm_duo.report.svg import WIDTH, add_curve, add_line, add_text, new_chart

HEIGHT = 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 64
TICKS = 5


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line.

    Attributes:
        name: in the legend.
        values: one per label.
        style: class of the line: "duo" or "full", see the page's style.
    """

    name: str
    values: Sequence[float]
    style: str


def line_chart(
    title: str, labels: Sequence[str], series: Sequence[Series], *, log: bool = False
) -> str:
    """An SVG element.

    Args:
        title: read out in place of the picture.
        labels: of the points, evenly spaced.
        series: as many values each as there are labels; above 0 with ``log``.
        log: a logarithmic vertical axis.

    Raises:
        ValueError: no points, a series of another length, or a value that the axis cannot show.
    """
    values = [value for line in series for value in line.values]
    if not values or any(len(line.values) != len(labels) for line in series):
        raise ValueError(f"chart {title!r}: expected one value per label in every series")
    if not all(math.isfinite(value) and (value > 0 or not log) for value in values):
        raise ValueError(f"chart {title!r}: expected numbers, above 0 on a logarithmic axis")
    axis = _Axis(values, log)
    root = new_chart(title, HEIGHT)
    for tick in axis.ticks():
        at = axis.place(tick)
        add_line(root, (LEFT, at), (WIDTH - RIGHT, at), "grid")
        add_text(root, LEFT - 6, at + 4, f"{tick:.3g}", "end")
    places = [
        LEFT + (WIDTH - LEFT - RIGHT) * (index + 0.5) / len(labels) for index in range(len(labels))
    ]
    for place, label in zip(places, labels, strict=True):
        add_text(root, place, HEIGHT - BOTTOM + 18, label, "middle")
    for index, line in enumerate(series):
        points = [(x, axis.place(y)) for x, y in zip(places, line.values, strict=True)]
        titles = [
            f"{line.name}, {label}: {value:.4g}"
            for label, value in zip(labels, line.values, strict=True)
        ]
        add_curve(root, line.style, points, titles)
        at_x = LEFT + index * (WIDTH - LEFT - RIGHT) / len(series)
        add_line(root, (at_x, HEIGHT - 18), (at_x + 24, HEIGHT - 18), f"line {line.style}")
        add_text(root, at_x + 30, HEIGHT - 14, line.name, "start")
    return ElementTree.tostring(root, encoding="unicode")


class _Axis:
    """The vertical axis, with a little room at both ends."""

    def __init__(self, values: Sequence[float], log: bool) -> None:
        self.log = log
        low, high = (self._scaled(bound) for bound in (min(values), max(values)))
        room = 0.08 * (high - low) or 0.5
        self.low, self.high = low - room, high + room

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def place(self, value: float) -> float:
        share = (self._scaled(value) - self.low) / (self.high - self.low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    def ticks(self) -> list[float]:
        steps = [self.low + (self.high - self.low) * (i + 0.5) / TICKS for i in range(TICKS)]
        return [10**step for step in steps] if self.log else steps
