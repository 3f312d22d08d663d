"""Elements that the charts share."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

WIDTH = 640


def new_chart(title: str, height: int) -> ElementTree.Element:
    """An empty SVG; ``title`` is read out in place of the picture."""
    root = ElementTree.Element(
        "svg", {"viewBox": f"0 0 {WIDTH} {height}", "role": "img", "class": "chart"}
    )
    ElementTree.SubElement(root, "title").text = title
    return root


def add_line(
    root: ElementTree.Element, start: tuple[float, float], end: tuple[float, float], style: str
) -> None:
    """A straight line; ``style`` is a class of the page."""
    places = {"x1": start[0], "y1": start[1], "x2": end[0], "y2": end[1]}
    attributes = {key: f"{value:.1f}" for key, value in places.items()}
    ElementTree.SubElement(root, "line", {"class": style, **attributes})


def add_text(root: ElementTree.Element, x: float, y: float, text: str, anchor: str) -> None:
    """A text that starts, ends or is centred at a place."""
    attributes = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    ElementTree.SubElement(root, "text", attributes).text = text


def add_curve(
    root: ElementTree.Element,
    style: str,
    places: Sequence[tuple[float, float]],
    titles: Sequence[str],
) -> None:
    """A line through places, with a dot at each that tells its title."""
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    ElementTree.SubElement(root, "polyline", {"class": f"line {style}", "points": corners})
    for (x, y), title in zip(places, titles, strict=True):
        attributes = {"class": f"dot {style}", "cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "4"}
        dot = ElementTree.SubElement(root, "circle", attributes)
        ElementTree.SubElement(dot, "title").text = title
