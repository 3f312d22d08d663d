"""Perplexity by position: where in a text the streaming heads' short memory begins to cost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_duo.evaluate.prompts import CountTokens, PlainPrompts
from vllm_duo.evaluate.statistics import RESAMPLES
from vllm_duo.evaluate.task import Wanted, haystack

PARTS = 4
TEXTS = 8
CHANCE_SHARE = 0.9
"""Of ln(vocabulary): a mean loss above it is no better than guessing, so no verdict."""


def make_texts(tokens: int, seed: int, count_tokens: CountTokens) -> list[str]:
    """``TEXTS`` texts of filler sentences of about ``tokens`` tokens; no chat template is applied."""
    rng = random.Random(f"perplexity {seed}")
    wanted = Wanted(tokens=tokens, depth=0, rng=rng, prompts=PlainPrompts(count_tokens))
    return [haystack(wanted, "This is a text.", [], "The end.", "") for _ in range(TEXTS)]


def compare(
    full: Sequence[Sequence[float]], duo: Sequence[Sequence[float]], vocabulary: int, seed: int = 0
) -> dict[str, Any]:
    """Mean loss in nats a token of both, by quarter of the text, and a verdict on the whole.

    Args:
        full: log-probabilities of each text's tokens, with full attention.
        duo: the same with duo.
        vocabulary: tokens that the model knows.
        seed: of the resampling, which draws whole texts.

    Raises:
        ValueError: the texts differ in number or length.
    """
    if not full or [len(text) for text in full] != [len(text) for text in duo]:
        raise ValueError(
            f"expected the same texts of both, got {[len(t) for t in full]} and "
            f"{[len(t) for t in duo]} tokens"
        )
    parts = [
        {
            "from": part / PARTS,
            "to": (part + 1) / PARTS,
            "full_nats": -float(np.mean([_part(text, part).mean() for text in full])),
            "duo_nats": -float(np.mean([_part(text, part).mean() for text in duo])),
        }
        for part in range(PARTS)
    ]
    means = np.array([[np.mean(text) for text in side] for side in (full, duo)])  # [2, texts]
    losses = means[0] - means[1]
    rng = np.random.default_rng(seed)
    drawn = losses[rng.integers(0, len(losses), size=(RESAMPLES, len(losses)))].mean(axis=1)
    low, high = (float(bound) for bound in np.percentile(drawn, [2.5, 97.5]))
    full_nats, duo_nats = (-float(mean) for mean in means.mean(axis=1))
    kind = "lost" if low > 0 else "within_noise"
    told = f"costs {duo_nats - full_nats:.4f} nats a token ({low:.4f} to {high:.4f})"
    if full_nats > CHANCE_SHARE * np.log(vocabulary):
        kind = "cannot_do"
        told = f"model does not know such text ({full_nats:.2f} nats a token): no verdict"
    elif kind == "within_noise":
        told = f"within noise; more than {max(high, 0):.4f} nats a token is excluded"
    return {
        "kind": kind,
        "told": told,
        "full_nats": full_nats,
        "duo_nats": duo_nats,
        "loss_nats": duo_nats - full_nats,
        "loss_interval": {"low": low, "high": high},
        "by_position": parts,
    }


def _part(logprobs: Sequence[float], part: int) -> Any:
    """The tokens of one of ``PARTS`` equal parts."""
    return np.array_split(np.asarray(logprobs), PARTS)[part]
