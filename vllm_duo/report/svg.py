"""Elements that the charts share."""

from __future__ import annotations

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
