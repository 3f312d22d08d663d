"""Which layers of a model slide, and whether that hides anything."""

from __future__ import annotations

import pytest

from vllm_duo.windows import describe, in_force, layer_windows, slides_throughout

MIXED = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("window", "kinds", "expected"),
    [
        (None, None, ()),
        (0, None, ()),
        (8, None, (8, 8)),
        (8, MIXED, (8, None)),
        (8, ["sliding_attention"] * 2, (8, 8)),
        (8, ["full_attention"] * 2, ()),
        (None, MIXED, ()),
        # Layers beyond the model's, as drafting heads have them, are not read.
        (8, [*MIXED, "sliding_attention"], (8, None)),
        (8, ["sliding_attention"], None),
        ([8, 16], None, None),
    ],
)
def test_windows_by_layer(window, kinds, expected):
    assert layer_windows(2, window, kinds) == expected


@pytest.mark.parametrize(("longest", "expected"), [(9, (8, None)), (8, ()), (7, ())])
def test_only_windows_that_hide_something(longest, expected):
    assert in_force((8, None), longest) == expected


def test_without_windows_nothing_slides():
    assert in_force((), 8) == ()
    assert not slides_throughout(())
    assert describe(()) == ""


def test_words():
    assert slides_throughout((8, 8))
    assert not slides_throughout((8, None))
    assert describe((512, None, 512, None)) == "2 of 4 layers slide over 512 tokens"
