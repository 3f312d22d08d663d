"""Comparisons where a rounding of the model's own kind of numbers may decide between two tokens."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def rounded(model: Path, dtype: torch.dtype, folder: Path) -> Path:
    """The checkpoint with its weights rounded, so that the oracle has the served ones; its folder."""
    folder.mkdir(parents=True)
    shutil.copy(model / "config.json", folder)
    weights = {
        name: weight.to(dtype) for name, weight in load_file(model / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def errors(oracle, prompts, answers) -> torch.Tensor:
    """[n] differences of all reported log-probabilities from the oracle's, each answer's own tokens
    forced on the oracle."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        reference = oracle.logprobs([*prompt, *answer.tokens])[len(prompt) - 1 : -1]
        for reported, row in zip(answer.logprobs, reference, strict=True):
            found += [logprob - float(row[token]) for token, logprob in reported.items()]
    return torch.tensor(found)


def rms(values: torch.Tensor) -> float:
    """Root of the mean square."""
    return float(values.square().mean().sqrt())


def compared_tokens(answers, others, tie: float) -> int:
    """How many tokens agree before the first near tie that was decided otherwise, over all answers.

    Up to there both saw the same tokens; after it they continue different texts.

    Args:
        answers: of one engine.
        others: of the other.
        tie: how far apart, by either engine, the log-probabilities of the two tokens may lie.

    Raises:
        AssertionError: two tokens differ and it was no near tie.
    """
    same = 0
    for answer, other in zip(answers, others, strict=True):
        for step, (token, another) in enumerate(zip(answer.tokens, other.tokens, strict=True)):
            if token != another:
                gap = max(
                    answer.logprobs[step][token] - answer.logprobs[step].get(another, -math.inf),
                    other.logprobs[step][another] - other.logprobs[step].get(token, -math.inf),
                )
                assert gap <= tie, f"step {step}: {token} and {another} lie {gap:.4f} apart"
                break
            same += 1
    return same
