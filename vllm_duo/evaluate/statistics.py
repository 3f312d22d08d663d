"""Confidence intervals of scores and of paired differences, and the verdict drawn from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Z_95 = 1.959963984540054
CONFIDENCE = 0.95
RESAMPLES = 4000
MIN_SCORE = 0.3
"""With full attention a model that scores less than this cannot do the task: no verdict on duo."""

VerdictKind = Literal["cannot_do", "lost", "within_noise"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the paired scores of a task say.

    Attributes:
        kind: "cannot_do": the model fails with full attention already, so nothing can be said;
            "lost": the interval of the loss lies above 0; "within_noise": it does not.
        full: mean score with full attention, 0 to 1.
        duo: the same with duo, on the same samples.
        loss: full - duo.
        loss_interval: of ``loss``; its upper end is the loss that is not excluded.
        samples: paired samples.
    """

    kind: VerdictKind
    full: float
    duo: float
    loss: float
    loss_interval: Interval
    samples: int

    def told(self) -> str:
        """The verdict in words, in points of 100."""
        low, high = 100 * self.loss_interval.low, 100 * self.loss_interval.high
        if self.kind == "cannot_do":
            solved = f"{100 * self.full:.0f} of 100 with full attention"
            return f"model can't do this task ({solved}): no verdict"
        if self.kind == "lost":
            return f"lost {100 * self.loss:.1f} points ({low:.1f} to {high:.1f})"
        return f"within noise; a loss of more than {max(high, 0):.1f} points is excluded"


def wilson(right: float, total: int) -> Interval:
    """Wilson's interval of a share; also for sums of partial scores, for which it is too wide.

    Args:
        right: right answers, 0 to ``total``.
        total: answers.

    Raises:
        ValueError: no answers, or more right than there are.

    Worked example: 9 of 10: 0.596 to 0.982.
    Source: Wilson, "Probable inference", 1927.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"expected 0 to total right answers of at least 1, got {right} of {total}")
    share, square = right / total, Z_95 * Z_95
    middle = (share + square / (2 * total)) / (1 + square / total)
    spread = math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    half = Z_95 * spread / (1 + square / total)
    return Interval(low=max(middle - half, 0.0), high=min(middle + half, 1.0))


def paired_loss(full: Sequence[float], duo: Sequence[float], seed: int = 0) -> Interval:
    """Interval of mean(full) - mean(duo) over the same samples: percentile bootstrap of the pairs.

    Where the bootstrap knows nothing, all differences being 0, n samples without a difference exclude
    a share of 1 - 0.025 ** (1 / n) of samples that differ, in both directions.

    Args:
        full: scores with full attention, 0 to 1.
        duo: scores with duo of the same samples.
        seed: of the resampling.

    Raises:
        ValueError: no samples, or not the same number of both.
    """
    if not full or len(full) != len(duo):
        raise ValueError(f"expected as many scores of both, got {len(full)} and {len(duo)}")
    differences = np.subtract(full, duo)
    count = len(differences)
    if not differences.any():
        unseen = 1 - ((1 - CONFIDENCE) / 2) ** (1 / count)
        return Interval(low=-unseen, high=unseen)
    rng = np.random.default_rng(seed)
    picked = rng.integers(0, count, size=(RESAMPLES, count))
    means = differences[picked].mean(axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(low=float(low), high=float(high))


def judge(full: Sequence[float], duo: Sequence[float], *, seed: int = 0) -> Verdict:
    """Compare the scores of the same samples.

    Raises:
        ValueError: no samples, or not the same number of both.
    """
    interval = paired_loss(full, duo, seed)
    mean_full, mean_duo = float(np.mean(full)), float(np.mean(duo))
    kind: VerdictKind = "lost" if interval.low > 0 else "within_noise"
    if mean_full < MIN_SCORE:
        kind = "cannot_do"
    return Verdict(
        kind=kind,
        full=mean_full,
        duo=mean_duo,
        loss=mean_full - mean_duo,
        loss_interval=interval,
        samples=len(full),
    )
