"""Layers into bins: as few and as narrow as can be."""

from __future__ import annotations

from math import inf

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kv_cache.layouts import partitions
from vllm_duo.kv_cache.packing import (
    fit_bins,
    narrowest_bins,
    spread_ranks,
    subset_sums,
)


def pack_bins(widths, capacity):
    """The fewest bins that hold the layers, none wider than ``capacity`` heads, as ``fit_bins`` packs.

    Worked example: widths (10, 8, 6, 5, 3, 2) are 34 heads, two bins of 17: 10 + 5 + 2 and 8 + 6 + 3.
    First-fit decreasing makes three: 10 + 6, 8 + 5 + 3 and 2.
    """
    for num_bins in range(len(widths) + 1):
        bins = fit_bins(widths, capacity, num_bins)
        if bins is not None:
            return bins
    raise AssertionError(f"a layer of {max(widths)} heads is wider than a bin of {capacity}")


def least_width_by_bins(widths) -> dict[int, float]:
    """Oracle: width of the widest bin, by number of bins, over all partitions."""
    layers = [at for at, width in enumerate(widths) if width]
    least: dict[int, float] = {}
    for bins in partitions(layers) if len(layers) < 8 else merged(widths, layers):
        widest = max((sum(widths[at] for at in each) for each in bins), default=0)
        least[len(bins)] = min(least.get(len(bins), inf), widest)
    return least


def merged(widths, layers):
    """Like ``partitions``, without telling layers of one width apart."""
    seen = set()
    for bins in partitions(layers):
        key = tuple(sorted(tuple(sorted(widths[at] for at in each)) for each in bins))
        if key not in seen:
            seen.add(key)
            yield bins


class TestPacking:
    @settings(deadline=None)
    @given(st.lists(st.integers(0, 12), max_size=9), st.integers(12, 30))
    def test_bins_are_the_fewest(self, widths, capacity):
        bins = pack_bins(widths, capacity)
        layers = [at for at, width in enumerate(widths) if width]
        assert sorted(at for each in bins for at in each) == layers
        assert all(sum(widths[at] for at in each) <= capacity for each in bins)
        fewest = least_width_by_bins(widths)
        assert len(bins) == min(num for num, width in fewest.items() if width <= capacity)

    @settings(deadline=None)
    @given(st.lists(st.integers(0, 12), max_size=9).filter(any), st.integers(1, 10))
    def test_widest_bin_is_the_narrowest(self, widths, num_bins):
        bins = narrowest_bins(widths, num_bins)
        fewest = least_width_by_bins(widths)
        assert len(bins) <= num_bins
        assert max(sum(widths[at] for at in each) for each in bins) == min(
            width for num, width in fewest.items() if num <= num_bins
        )

    def test_first_fit_decreasing_would_need_a_bin_more(self):
        widths = (10, 8, 6, 5, 3, 2)
        assert pack_bins(widths, 17) == ((0, 3, 5), (1, 2, 4))
        loads: list[int] = []
        for width in widths:
            place = next((at for at, load in enumerate(loads) if load + width <= 17), len(loads))
            loads[place:] = [*(loads[place : place + 1] or [0]), *loads[place + 1 :]]
            loads[place] += width
        assert loads == [16, 16, 2]

    def test_worked_examples(self):
        assert narrowest_bins((3, 0, 2, 1, 2), 2) == ((0, 3), (2, 4))
        assert fit_bins((3, 0, 2, 1, 2), 4, 2) == ((0, 3), (2, 4))
        assert fit_bins((3, 0, 2, 1, 2), 4, 1) is None
        assert subset_sums((2, 3), 5) == 0b101101
        assert spread_ranks([(2, 0, 1, 1), (0, 2, 1, 1)], 2) == ((0, 1), (2, 3))

    def test_filling_bins_one_by_one_is_not_enough(self):
        # 8 fills up with 7 + 5, after which 6, 6, 4, 4 do not fit one bin; 8 + 6 + 6 leaves 7 5 4 4.
        bins = fit_bins((8, 7, 6, 6, 5, 4, 4), 20, 2)
        assert bins == ((0, 2, 3), (1, 4, 5, 6))

    @given(
        st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=9), min_size=2, max_size=4),
        st.integers(1, 5),
    )
    def test_ranks_share_their_bins(self, ranks, num_bins):
        bins = spread_ranks(ranks, num_bins)
        assert len(bins) <= num_bins
        streaming = [at for at in range(9) if any(widths[at] for widths in ranks)]
        assert sorted(at for each in bins for at in each) == streaming

    def test_layer_wider_than_a_bin(self):
        assert fit_bins((5,), 4, 3) is None
