"""Figures with matplotlib, which the extra ``plots`` brings: made without a display."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg", ".pdf")
PNG_DPI = 150
DUO_COLOUR = "#0072b2"
FULL_COLOUR = "#d55e00"


def check_figure_file(file: Path) -> None:
    """Refuse a file name that no figure is written to, before any work is done.

    Raises:
        ValueError: another ending than those of ``SUFFIXES``, or no such folder.
        RuntimeError: matplotlib is not installed.
    """
    from importlib.util import find_spec

    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"figure {str(file)!r}: expected a name that ends in {', '.join(SUFFIXES)}: change it"
        )
    if not file.absolute().parent.is_dir():
        raise ValueError(
            f"figure {str(file)!r}: expected an existing folder, found no {file.absolute().parent}: "
            "make it"
        )
    if find_spec("matplotlib") is None:
        raise RuntimeError(
            "figures need matplotlib, which is not installed: pip install 'vllm-duo[plots]'"
        )


def new_figure(width: float = 7.0, height: float = 4.5) -> tuple[Figure, Axes]:
    """An empty figure, in inches, that belongs to no window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def save_figure(figure: Figure, file: Path) -> None:
    """Write it, the same bytes for the same figure.

    Raises:
        ValueError: ``check_figure_file`` would refuse the file.
        OSError: it cannot be written.
    """
    import matplotlib

    check_figure_file(file)
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "vllm-duo"}):
        figure.savefig(file, dpi=PNG_DPI, metadata=metadata.get(file.suffix.lower()))


def png_of(figure: Figure) -> bytes:
    """The bytes that ``save_figure`` would write to a .png file; no disk is needed."""
    from io import BytesIO

    found = BytesIO()
    figure.savefig(found, dpi=PNG_DPI, format="png")
    return found.getvalue()
