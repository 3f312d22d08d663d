"""The README's memory table is what the layout computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.published import published_layout

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
LENGTHS = (4096, 32768, 131072)


@pytest.mark.parametrize("name", ["Meta-Llama-3.1-8B-Instruct", "Llama-2-7B-32K-Instruct"])
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_memory_table(name, sparsity):
    layout = published_layout(name, sparsity)
    stock = [layout.full_attention_bytes(n) / 2**30 for n in LENGTHS]
    held = [layout.held_bytes(n) / 2**30 for n in LENGTHS]
    assert f"stock | {' | '.join(f'{s:.2f} GiB' for s in stock)} |" in README
    cells = [f"{h:.2f} GiB ({s / h:.2f} x)" for h, s in zip(held, stock, strict=True)]
    assert f" | {' | '.join(cells)} |" in README
