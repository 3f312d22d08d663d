"""``multi-turn``: questions one after the other over one context (SCBench, arXiv:2412.10319).

The second and later questions resume at what the cache kept of the context and of the questions before
them. Earlier answers are given as they should have been, so that every turn asks the same of both.
"""

from __future__ import annotations

from vllm_duo.evaluate.passkey import SLOTS
from vllm_duo.evaluate.task import Sample, Task, Wanted, distinct, haystack, share_found

TURNS = 3


def make(wanted: Wanted) -> list[Sample]:
    """``TURNS`` questions for the pass keys of different names."""
    names = wanted.rng.sample(SLOTS["person"], TURNS)
    keys = distinct(wanted.rng, 5, TURNS)
    facts = [f"The pass key of the {n} is {k}." for n, k in zip(names, keys, strict=True)]
    order = wanted.rng.sample(range(TURNS), TURNS)
    asked = [f"What is the pass key of the {names[i]}?" for i in order]
    starts = [f"The pass key of the {names[i]} is" for i in order]
    text = haystack(
        wanted,
        "Somewhere in this text are pass keys. Read the text and remember them.",
        facts,
        asked[0],
        starts[0],
    )
    samples = []
    turns: tuple[str, ...] = (text,)
    for turn, index in enumerate(order):
        if turn:
            before = f"{starts[turn - 1]} {keys[order[turn - 1]]}."
            turns = (*turns, before, asked[turn])
        samples.append(
            Sample(
                turns=turns,
                start=starts[turn],
                answers=(keys[index],),
                length=wanted.tokens,
                turn=turn,
            )
        )
    return samples


TASK = Task(
    name="multi-turn",
    summary=f"{TURNS} questions over one context, the later ones from what the cache kept",
    max_tokens=12,
    make=make,
    score=share_found,
)
