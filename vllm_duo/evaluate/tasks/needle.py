"""``needle``: one pass key in a haystack, at every depth (Mohtashami and Jaggi, arXiv:2305.16300)."""

from __future__ import annotations

from vllm_duo.evaluate.passkey import make_prompt
from vllm_duo.evaluate.task import Sample, Task, Wanted

DIGITS = 5


def make(wanted: Wanted) -> list[Sample]:
    """One pass key at ``wanted.depth``."""
    prompt = make_prompt(
        wanted.tokens, rng=wanted.rng, count_tokens=wanted.count_tokens, depth=wanted.depth
    )
    return [
        Sample(
            prompt=prompt.text,
            answers=(prompt.answer,),
            length=wanted.tokens,
            depth=wanted.depth,
        )
    ]


def score(sample: Sample, completion: str) -> float:
    """1 if the first number of the completion is the pass key."""
    digits = ""
    for character in completion:
        if character.isdecimal():
            digits += character
        elif digits:
            break
    return float(digits == sample.answers[0])


TASK = Task(
    name="needle",
    summary="one pass key in a haystack, at every depth",
    max_tokens=12,
    make=make,
    score=score,
)
