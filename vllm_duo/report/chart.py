"""Line charts as inline SVG, in the page's own colours so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

WIDTH, HEIGHT = 640, 300
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
    root = ElementTree.Element(
        "svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "class": "chart"}
    )
    ElementTree.SubElement(root, "title").text = title
    for tick in axis.ticks():
        at = axis.place(tick)
        _line(root, (LEFT, at), (WIDTH - RIGHT, at), "grid")
        _text(root, LEFT - 6, at + 4, f"{tick:.3g}", "end")
    places = [
        LEFT + (WIDTH - LEFT - RIGHT) * (index + 0.5) / len(labels) for index in range(len(labels))
    ]
    for place, label in zip(places, labels, strict=True):
        _text(root, place, HEIGHT - BOTTOM + 18, label, "middle")
    for index, line in enumerate(series):
        points = [(x, axis.place(y)) for x, y in zip(places, line.values, strict=True)]
        ElementTree.SubElement(
            root,
            "polyline",
            {
                "class": f"line {line.style}",
                "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in points),
            },
        )
        for (x, y), label, value in zip(points, labels, line.values, strict=True):
            dot = ElementTree.SubElement(
                root,
                "circle",
                {"class": f"dot {line.style}", "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "4"},
            )
            ElementTree.SubElement(dot, "title").text = f"{line.name}, {label}: {value:.4g}"
        at_x = LEFT + index * (WIDTH - LEFT - RIGHT) / len(series)
        _line(root, (at_x, HEIGHT - 18), (at_x + 24, HEIGHT - 18), f"line {line.style}")
        _text(root, at_x + 30, HEIGHT - 14, line.name, "start")
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


def _line(
    root: ElementTree.Element, start: tuple[float, float], end: tuple[float, float], style: str
) -> None:
    places = {"x1": start[0], "y1": start[1], "x2": end[0], "y2": end[1]}
    attributes = {key: f"{value:.1f}" for key, value in places.items()}
    ElementTree.SubElement(root, "line", {"class": style, **attributes})


def _text(root: ElementTree.Element, x: float, y: float, text: str, anchor: str) -> None:
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    ElementTree.SubElement(root, "text", attributes).text = text
