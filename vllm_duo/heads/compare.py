"""How far two head patterns agree: rank correlation, and the heads that both would keep or stream.

L is the number of layers, Hkv the number of KV heads of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_duo.heads.pattern import HeadPattern


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Two patterns cut at the same sparsity.

    Attributes:
        sparsity: as asked for.
        both_retrieval: heads that both keep whole.
        only_first: heads that only the first keeps whole.
        only_second: heads that only the second keeps whole.
        both_streaming: heads that both stream.
    """

    sparsity: float
    both_retrieval: int
    only_first: int
    only_second: int
    both_streaming: int

    @property
    def agreement(self) -> float:
        """Share of all heads that both put into the same class."""
        total = self.both_retrieval + self.only_first + self.only_second + self.both_streaming
        return (self.both_retrieval + self.both_streaming) / total

    @property
    def retrieval_iou(self) -> float:
        """Retrieval heads of both over those of either; 1 where neither has any."""
        either = self.both_retrieval + self.only_first + self.only_second
        return self.both_retrieval / either if either else 1.0

    @property
    def chance_agreement(self) -> float:
        """Agreement to expect of two patterns that know nothing of each other.

        Worked example: half of the heads stream in both: 0.5 * 0.5 + 0.5 * 0.5 = 0.5.
        """
        total = self.both_retrieval + self.only_first + self.only_second + self.both_streaming
        first = (self.both_retrieval + self.only_first) / total
        second = (self.both_retrieval + self.only_second) / total
        return first * second + (1 - first) * (1 - second)


def check_comparable(first: HeadPattern, second: HeadPattern) -> None:
    """Refuse patterns of different models.

    Raises:
        ValueError: their shapes differ.
    """
    if first.values.shape != second.values.shape:
        shapes = [f"{p.num_layers} x {p.num_kv_heads} (layers x KV heads)" for p in (first, second)]
        raise ValueError(
            f"patterns to compare: expected one shape, got {shapes[0]} and {shapes[1]}: compare "
            "patterns of one model"
        )


def overlap(first: HeadPattern, second: HeadPattern, sparsity: float) -> Overlap:
    """Cut both at a sparsity and count the heads by class.

    Raises:
        ValueError: the shapes differ, or the sparsity is no share.
    """
    check_comparable(first, second)
    a, b = (pattern.select(sparsity=sparsity).retrieval for pattern in (first, second))
    return Overlap(
        sparsity=sparsity,
        both_retrieval=int((a & b).sum()),
        only_first=int((a & ~b).sum()),
        only_second=int((~a & b).sum()),
        both_streaming=int((~a & ~b).sum()),
    )


def rank_correlation(first: HeadPattern, second: HeadPattern) -> float | None:
    """Spearman's rho of the clipped values of all heads, ties at their mean rank.

    Returns:
        -1 to 1; None where a pattern has one value for all heads.

    Raises:
        ValueError: the shapes differ.

    Worked example: values (0.1, 0.2, 0.9) and (0, 0.5, 1) rank the heads alike: 1.0; (0.9, 0.2, 0.1)
    the other way round: -1.0.
    """
    check_comparable(first, second)
    ranks = [mean_ranks(np.clip(p.values, 0.0, 1.0).ravel()) for p in (first, second)]
    if any(np.ptp(found) == 0 for found in ranks):
        return None
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def mean_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rank of each of [n] values from 1, equal values at the mean of their ranks.

    Worked example: (5, 7, 5) has the ranks (1.5, 3, 1.5).
    """
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[group]
    return ranks
