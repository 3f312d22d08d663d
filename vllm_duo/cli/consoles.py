"""Where commands write: results to stdout, errors and progress to stderr."""

from __future__ import annotations

from rich.console import Console

out = Console()
err = Console(stderr=True)
