"""``multi-key``: several pass keys with names, one is asked for (RULER, arXiv:2404.06654)."""

from __future__ import annotations

from vllm_duo.evaluate.passkey import SLOTS
from vllm_duo.evaluate.task import Sample, Task, Wanted, distinct, haystack, share_found

KEYS = 4


def make(wanted: Wanted) -> list[Sample]:
    """``KEYS`` names with a pass key each; one name is asked for."""
    names = wanted.rng.sample(SLOTS["person"], KEYS)
    keys = distinct(wanted.rng, 5, KEYS)
    asked = wanted.rng.randrange(KEYS)
    facts = [f"The pass key of the {n} is {k}." for n, k in zip(names, keys, strict=True)]
    start = f"The pass key of the {names[asked]} is"
    text = haystack(
        wanted,
        "Somewhere in this text are pass keys. Read the text and remember them.",
        facts,
        f"What is the pass key of the {names[asked]}?",
        start,
    )
    return [Sample(turns=(text,), start=start, answers=(keys[asked],), length=wanted.tokens)]


TASK = Task(
    name="multi-key",
    summary=f"{KEYS} pass keys with names, one is asked for",
    max_tokens=12,
    make=make,
    score=share_found,
)
