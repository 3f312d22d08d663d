"""``variable-tracking``: a chain of assignments through the text (RULER, arXiv:2404.06654)."""

from __future__ import annotations

import string
from itertools import pairwise

from vllm_duo.evaluate.task import Sample, Task, Wanted, distinct, haystack, share_found

HOPS = 4


def make(wanted: Wanted) -> list[Sample]:
    """A chain of ``HOPS`` variables with one value, and another chain to mistake it for."""
    names = ["".join(wanted.rng.sample(string.ascii_uppercase, 5)) for _ in range(2 * HOPS)]
    values = distinct(wanted.rng, 5, 2)
    chains = [names[:HOPS], names[HOPS:]]
    facts: list[str] = []
    lines = [
        [f"VAR {chain[0]} = {value}."]
        + [f"VAR {after} = VAR {before}." for before, after in pairwise(chain)]
        for chain, value in zip(chains, values, strict=True)
    ]
    for pair in zip(*lines, strict=True):
        facts += wanted.rng.sample(pair, 2)  # each chain keeps its order
    start = f"The {HOPS} variables with the value {values[0]} are"
    text = haystack(
        wanted,
        "This text assigns values to variables. Follow the assignments.",
        facts,
        f"Which {HOPS} variables have the value {values[0]}?",
        start,
    )
    return [Sample(turns=(text,), start=start, answers=tuple(chains[0]), length=wanted.tokens)]


TASK = Task(
    name="variable-tracking",
    summary=f"{HOPS} variables that follow from one another through the text",
    max_tokens=64,
    make=make,
    score=share_found,
)
