"""A plan as a picture: requests that fit at once over their length, duo and full attention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_duo.figures import DUO_COLOUR, FULL_COLOUR, new_figure, save_figure

if TYPE_CHECKING:
    from vllm_duo.planning.schema import Plan


def draw(plan: Plan, file: Path) -> None:
    """Write the picture.

    Args:
        plan: what to draw.
        file: .png, .svg or .pdf.

    Raises:
        ValueError: the file has another ending or no folder.
        RuntimeError: matplotlib is not installed.
    """
    figure, axes = new_figure()
    found = plan.settings
    for memory, label, colour, marker in (
        (plan, f"duo, {found.sparsity:.0%} of the heads stream", DUO_COLOUR, "o"),
        (plan.full, "full attention", FULL_COLOUR, "s"),
    ):
        axes.plot(
            [length.tokens for length in memory.by_length],
            [length.concurrent_requests for length in memory.by_length],
            marker=marker,
            color=colour,
            label=label,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens of a request")
    axes.set_ylabel("requests that fit at once")
    axes.set_title(f"{Path(found.model).name}, KV pool {found.kv_cache_bytes / 2**30:g} GiB")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    save_figure(figure, file)
