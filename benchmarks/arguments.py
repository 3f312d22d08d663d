"""Types of the benchmarks' arguments: what is not one ends in a usage error, before anything runs."""

from __future__ import annotations

import argparse
import math
from typing import TypeVar

Number = TypeVar("Number", int, float)


def positive_int(text: str) -> int:
    """A whole number from 1.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    return _within(int, text, 1, math.inf, "a whole number from 1")


def unit_share(text: str) -> float:
    """A number from 0 to 1.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    return _within(float, text, 0, 1, "a share from 0 to 1")


def _within(kind: type[Number], text: str, least: float, most: float, expected: str) -> Number:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
    return value
