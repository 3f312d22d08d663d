"""Heatmaps: a cell a head, in the order and with the marks of the pattern."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_duo.heads import HeadPattern
from vllm_duo.heads.picture import COLOURS, draw, heatmap, rgb_of

VALUES = np.array([[0.0, 1.0, 0.55], [-0.01, 0.3, 1.01]])
MARKS = np.array([[False, True, True], [False, False, True]])


def test_digits_without_colours():
    text = heatmap(VALUES, marks=MARKS, coloured=False).plain
    assert text == "   0 0 9*5*\n   1 0 3 9*\n"


def test_colours_follow_the_values():
    text = heatmap(VALUES, marks=None, coloured=True)
    cells = [span.style for span in text.spans]
    assert cells == [rgb_of(value) for value in VALUES.ravel()]
    assert cells[0] == "rgb({},{},{})".format(*COLOURS[0])
    assert cells[1] == "rgb({},{},{})".format(*COLOURS[-1])


@pytest.mark.parametrize("value", [0.0, 0.0624, 0.5, 0.99, 1.0])
def test_lighter_is_more(value):
    def lightness(colour: str) -> float:
        red, green, blue = (int(part) for part in colour[4:-1].split(","))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert lightness(rgb_of(value)) <= lightness(rgb_of(min(value + 0.1, 1)))


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_same_file_each_time(tmp_path, suffix):
    pattern = HeadPattern(VALUES)
    for name in ("a", "b"):
        draw(pattern, pattern.select(sparsity=0.5), "title", tmp_path / (name + suffix))
    first, second = (tmp_path / ("a" + suffix), tmp_path / ("b" + suffix))
    assert len(first.read_bytes()) > 1000
    assert first.read_bytes() == second.read_bytes()
