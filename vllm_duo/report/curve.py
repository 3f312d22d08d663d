"""Curves through points of two measures, as inline SVG in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from vllm_duo.report.svg import WIDTH, add_curve, add_line, add_text, new_chart

HEIGHT = 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 84
TICKS = 5


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line.

    Attributes:
        name: in the legend.
        style: class of the page.
        points: x, y and what the point is, in words.
    """

    name: str
    style: str
    points: Sequence[tuple[float, float, str]]


def curve_chart(title: str, x_name: str, curves: Sequence[Curve]) -> str:
    """Both axes from 0.

    Args:
        title: read out in place of the picture; it tells what y is.
        x_name: below the horizontal axis.
        curves: at least one with a point.

    Raises:
        ValueError: no points, or one that is no pair of numbers from 0 up.
    """
    values = [(x, y) for curve in curves for x, y, _ in curve.points]
    if not values or not all(math.isfinite(v) and v >= 0 for pair in values for v in pair):
        raise ValueError(f"chart {title!r}: expected points of numbers from 0 up")
    right, top = (1.08 * max(axis) or 1.0 for axis in zip(*values, strict=True))
    root = new_chart(title, HEIGHT)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * x / right,
            TOP + (HEIGHT - TOP - BOTTOM) * (1 - y / top),
        )

    for step in range(TICKS + 1):
        x, y = right * step / TICKS, top * step / TICKS
        add_line(root, place(0, y), place(right, y), "grid")
        add_text(root, LEFT - 6, place(0, y)[1] + 4, f"{y:.3g}", "end")
        add_text(root, place(x, 0)[0], HEIGHT - BOTTOM + 18, f"{x:.3g}", "middle")
    add_text(root, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 36, x_name, "middle")
    for index, curve in enumerate(curves):
        titles = [f"{curve.name}, {words}: {x:.4g}, {y:.4g}" for x, y, words in curve.points]
        add_curve(root, curve.style, [place(x, y) for x, y, _ in curve.points], titles)
        at = LEFT + index * (WIDTH - LEFT - RIGHT) / len(curves)
        add_line(root, (at, HEIGHT - 18), (at + 24, HEIGHT - 18), f"line {curve.style}")
        add_text(root, at + 30, HEIGHT - 14, curve.name, "start")
    return ElementTree.tostring(root, encoding="unicode")
