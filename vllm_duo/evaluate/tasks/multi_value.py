"""``multi-value``: one name with several pass keys, all are asked for (RULER, arXiv:2404.06654)."""

from __future__ import annotations

from vllm_duo.evaluate.passkey import SLOTS
from vllm_duo.evaluate.task import Sample, Task, Wanted, distinct, haystack, share_found

VALUES = 4


def make(wanted: Wanted) -> list[Sample]:
    """``VALUES`` pass keys of one name."""
    name = wanted.rng.choice(SLOTS["person"])
    keys = distinct(wanted.rng, 5, VALUES)
    start = f"The {VALUES} pass keys of the {name} are"
    text = haystack(
        wanted,
        "Somewhere in this text are pass keys. Read the text and remember them.",
        [f"One of the pass keys of the {name} is {key}." for key in keys],
        f"What are all pass keys of the {name}?",
        start,
    )
    return [Sample(turns=(text,), start=start, answers=tuple(keys), length=wanted.tokens)]


TASK = Task(
    name="multi-value",
    summary=f"one name with {VALUES} pass keys, all are asked for",
    max_tokens=48,
    make=make,
    score=share_found,
)
