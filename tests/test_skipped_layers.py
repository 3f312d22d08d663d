"""Layers that a quantised KV cache leaves out, by their names."""

from __future__ import annotations

import pytest

from vllm_duo.skipped_layers import skipped_layers

WINDOWS = (512, None, 512, None)


@pytest.mark.parametrize(
    ("names", "windows", "layers"),
    [
        ([], WINDOWS, set()),
        (["3", "0"], (), {0, 3}),
        (["sliding_window"], WINDOWS, {0, 2}),
        (["3", "sliding_window"], WINDOWS, {0, 2, 3}),
        (["sliding_window"], (), set()),
    ],
)
def test_indices_and_windows(names, windows, layers):
    assert skipped_layers(names, 4, windows) == layers


@pytest.mark.parametrize("name", ["4", "-1", "03", "full_attention", "", "1.0"])
def test_names_that_vllm_would_pass_over(name):
    with pytest.raises(ValueError, match=r"expected layers from 0 to 3 or sliding_window, got '"):
        skipped_layers(["0", name], 4, WINDOWS)
