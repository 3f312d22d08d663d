"""The end of a log, for messages about a process that failed."""

from __future__ import annotations

from pathlib import Path

TAIL_LINES = 25


def log_tail(log: Path) -> str:
    """The last ``TAIL_LINES`` lines of a log; bytes that are no UTF-8 are replaced."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
