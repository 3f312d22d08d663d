"""The part of the page that shows a head pattern."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vllm_duo.heads import HeadPattern
from vllm_duo.heads.discovery import MODEL_PATTERN_FOLDER
from vllm_duo.heads.picture import rgb_of
from vllm_duo.report.grid import GridCell, grid_chart
from vllm_duo.report.page import Block, row

SPARSITIES = (0.25, 0.5, 0.75)
SHOWN = 0.5
LEGEND_STEPS = 5


def name_of(folder: Path) -> str:
    """A name that tells patterns apart: the model's where the folder bears a model's usual one."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == MODEL_PATTERN_FOLDER else folder.name


def blocks(pattern: HeadPattern) -> Iterator[Block]:
    """Every head's value, and what is left at some cuts."""
    kept = pattern.select(sparsity=SHOWN).retrieval
    title = (
        f"Values by layer (down) and KV head (across), 0 to 1; dots: retrieval heads when {SHOWN:.0%} "
        "of the heads stream"
    )
    cells = [
        [
            GridCell(
                colour=rgb_of(float(value)),
                told=f"layer {layer}, KV head {head}: {value:.3f}",
                marked=bool(kept[layer, head]),
            )
            for head, value in enumerate(values)
        ]
        for layer, values in enumerate(pattern.values)
    ]
    steps = [step / LEGEND_STEPS for step in range(LEGEND_STEPS + 1)]
    yield Block(
        title=title,
        chart=grid_chart(
            title,
            [f"layer {layer}" for layer in range(pattern.num_layers)],
            [str(head) for head in range(pattern.num_kv_heads)],
            cells,
            row_height=14,
            legend=[GridCell(colour=rgb_of(step), told=f"{step:g}") for step in steps],
        ),
    )
    rows = []
    for sparsity in SPARSITIES:
        selection = pattern.select(sparsity=sparsity)
        retrieval = int(selection.retrieval.sum())
        rows.append(
            row(
                f"{sparsity:.0%}",
                f"{retrieval:,} of {selection.retrieval.size:,}",
                str(int(selection.retrieval.any(axis=1).sum())),
                selection.mask_hash,
            )
        )
    columns = ("streaming", "retrieval heads", "layers with one", "mask hash")
    yield Block(title="Selections", columns=columns, rows=rows)
