"""Intervals against published figures, and the verdicts that follow from them."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_duo.evaluate.statistics import judge, paired_loss, wilson


class TestWilson:
    @pytest.mark.parametrize(
        ("right", "total", "low", "high"),
        # Newcombe 1998, table I, method 3 (score without continuity correction).
        [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)],
    )
    def test_published_figures(self, right, total, low, high):
        found = wilson(right, total)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)

    def test_all_right_is_not_certain(self):
        assert wilson(10, 10).low < 0.75
        assert wilson(10, 10).high == pytest.approx(1)

    @pytest.mark.parametrize(("right", "total"), [(0, 0), (2, 1), (-1, 1)])
    def test_bad_counts(self, right, total):
        with pytest.raises(ValueError, match="expected 0 to total right answers"):
            wilson(right, total)


class TestPairedLoss:
    def test_covers_the_true_loss_about_as_often_as_it_says(self):
        rng, hits = np.random.default_rng(0), 0
        for trial in range(200):
            full = (rng.random(60) < 0.9).astype(float)
            duo = full * (rng.random(60) < 0.8)  # the true loss is 0.18
            found = paired_loss(full.tolist(), duo.tolist(), seed=trial)
            hits += found.low <= 0.18 <= found.high
        assert 178 <= hits <= 200

    def test_no_difference_in_n_pairs_excludes_little(self):
        assert paired_loss([1.0] * 20, [1.0] * 20).high == pytest.approx(1 - 0.025 ** (1 / 20))
        assert paired_loss([1.0] * 200, [1.0] * 200).high < 0.02

    def test_same_seed_same_interval(self):
        full, duo = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]
        assert paired_loss(full, duo, seed=3) == paired_loss(full, duo, seed=3)

    @pytest.mark.parametrize(("full", "duo"), [([], []), ([1.0], [1.0, 0.0])])
    def test_unpaired(self, full, duo):
        with pytest.raises(ValueError, match="expected as many scores of both"):
            paired_loss(full, duo)


class TestVerdict:
    def test_all_lost(self):
        found = judge([1.0] * 20, [0.0] * 20)
        assert found.kind == "lost"
        assert found.told().startswith("lost 100.0 points")

    def test_some_lost(self):
        found = judge([1.0] * 40, [1.0] * 30 + [0.0] * 10)
        assert found.kind == "lost"
        assert found.loss == 0.25
        assert 0 < found.loss_interval.low < 0.25 < found.loss_interval.high

    def test_one_of_twenty_may_be_chance(self):
        assert judge([1.0] * 20, [1.0] * 19 + [0.0]).kind == "within_noise"

    def test_no_difference(self):
        found = judge([1.0] * 40, [1.0] * 40)
        assert found.told() == "within noise; a loss of more than 8.8 points is excluded"

    def test_duo_better_is_no_loss(self):
        assert judge([0.0, 1.0] * 10, [1.0] * 20).kind == "within_noise"

    @pytest.mark.parametrize("duo", [0.0, 1.0])
    def test_model_that_cannot_do_the_task_gets_none(self, duo):
        found = judge([0.0] * 18 + [1.0] * 2, [duo] * 20)
        assert found.kind == "cannot_do"
        assert found.told() == (
            "model can't do this task (10 of 100 with full attention): no verdict"
        )
