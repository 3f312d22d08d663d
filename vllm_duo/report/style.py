"""Colours and rules of the charts: on the page in light and dark, in files in light alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

LIGHT = {
    "text": "#1b1b1b",
    "back": "#ffffff",
    "soft": "#f2f2f0",
    "rule": "#c9c9c4",
    "duo": "#0060a0",
    "full": "#b34700",
    "good": "#1a6b2c",
    "bad": "#b00020",
    "unsure": "#7a5c00",
}
DARK = {
    "text": "#ececec",
    "back": "#16181b",
    "soft": "#22262b",
    "rule": "#454b52",
    "duo": "#6db7ee",
    "full": "#f0a064",
    "good": "#7fd092",
    "bad": "#ff8a95",
    "unsure": "#e3c05c",
}
CHART_RULES = """\
svg text { fill: var(--text); font-size: 12px; }
svg text.on-colour { fill: #000000; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2.5; }
svg .line.duo { stroke: var(--duo); }
svg .line.full { stroke: var(--full); stroke-dasharray: 7 4; }
svg .line.second { stroke-dasharray: 2 5; stroke-linecap: round; }
svg .line.third { stroke-dasharray: 12 4; }
svg .dot.duo { fill: var(--duo); }
svg .dot.full { fill: var(--full); }
svg .dot.second { fill-opacity: .7; }
svg .dot.third { fill-opacity: .45; }
svg .mark { fill: #ffffff; stroke: #000000; stroke-width: 1; }
"""


def variables(colours: Mapping[str, str]) -> str:
    """CSS that gives the rules their colours."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def rules_in_light() -> str:
    """``CHART_RULES`` with the light colours put in: few programs know CSS variables in SVG files."""
    return re.sub(r"var\(--(\w+)\)", lambda found: LIGHT[found[1]], CHART_RULES)
