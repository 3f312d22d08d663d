"""Agreement of two patterns, against sums done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_duo.heads import HeadPattern
from vllm_duo.heads.compare import mean_ranks, overlap, rank_correlation

A = HeadPattern([[0.1, 0.9], [0.8, 0.2]])
B = HeadPattern([[0.2, 0.9], [0.1, 0.3]])


class TestOverlap:
    def test_counts(self):
        found = overlap(A, B, 0.5)  # A keeps heads 1 and 2 of four, B keeps 1 and 3
        assert (found.both_retrieval, found.only_first) == (1, 1)
        assert (found.only_second, found.both_streaming) == (1, 1)
        assert found.agreement == 0.5
        assert found.retrieval_iou == pytest.approx(1 / 3)
        assert found.chance_agreement == 0.5

    def test_chance_of_unequal_classes(self):
        # One of four stays in both: 1/4 * 1/4 + 3/4 * 3/4.
        assert overlap(A, B, 0.75).chance_agreement == pytest.approx(10 / 16)

    def test_same_pattern_agrees(self):
        assert overlap(A, A, 0.25).agreement == 1

    def test_no_retrieval_heads_at_all(self):
        assert overlap(A, B, 1.0).retrieval_iou == 1


class TestRankCorrelation:
    def test_against_the_formula_without_ties(self):
        # Ranks 1 4 3 2 and 2 4 1 3: squared differences 1 + 0 + 4 + 1; 1 - 6 * 6 / (4 * 15).
        assert rank_correlation(A, B) == pytest.approx(1 - 36 / 60)

    def test_order_alone_counts(self):
        assert rank_correlation(A, HeadPattern(A.values**3)) == pytest.approx(1)
        assert rank_correlation(A, HeadPattern(1 - A.values)) == pytest.approx(-1)

    def test_values_are_clipped_first(self):
        raw = HeadPattern([[-0.01, 1.0], [0.0, 1.01]])
        assert rank_correlation(raw, HeadPattern([[0.0, 1.0], [0.0, 1.0]])) == pytest.approx(1)

    def test_equal_values_have_no_ranks(self):
        assert rank_correlation(A, HeadPattern.uniform(2, 2)) is None

    def test_ties_share_their_rank(self):
        assert mean_ranks(np.array([5.0, 7.0, 5.0, 1.0])).tolist() == [2.5, 4, 2.5, 1]


def test_other_shape():
    with pytest.raises(ValueError, match=r"expected one shape, got 2 x 2 .* and 1 x 4"):
        overlap(A, HeadPattern.uniform(1, 4), 0.5)
