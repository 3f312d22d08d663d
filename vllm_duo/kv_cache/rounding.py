"""Rounding of sizes in tokens and blocks."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """Ceiling of ``a / b`` for non-negative integers."""
    return -(-a // b)
