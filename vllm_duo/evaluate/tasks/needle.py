"""``needle``: one pass key in a haystack, at every depth (Mohtashami and Jaggi, arXiv:2305.16300)."""

from __future__ import annotations

from vllm_duo.evaluate.passkey import (
    INTRODUCTION,
    KEY_PREFIX,
    QUESTION,
    first_number,
    make_key,
)
from vllm_duo.evaluate.task import Sample, Task, Wanted, haystack


def make(wanted: Wanted) -> list[Sample]:
    """One pass key at ``wanted.depth``."""
    key = make_key(wanted.rng)
    text = haystack(
        wanted, INTRODUCTION, [f"{KEY_PREFIX} {key}."], QUESTION, KEY_PREFIX, depths=[wanted.depth]
    )
    return [
        Sample(
            turns=(text,),
            start=KEY_PREFIX,
            answers=(key,),
            length=wanted.tokens,
            depth=wanted.depth,
        )
    ]


def score(sample: Sample, completion: str) -> float:
    """1 if the first number of the completion is the pass key."""
    return float(first_number(completion) == sample.answers[0])


TASK = Task(
    name="needle",
    summary="one pass key in a haystack, at every depth",
    max_tokens=12,
    make=make,
    score=score,
)
