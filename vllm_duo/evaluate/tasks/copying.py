"""``copying``: a long answer that repeats a list from the text, where streaming is known to hurt."""

from __future__ import annotations

import re

from vllm_duo.evaluate.task import Sample, Task, Wanted, distinct, haystack

NUMBERS = 40


def make(wanted: Wanted) -> list[Sample]:
    """``NUMBERS`` numbers at ``wanted.depth``, to be repeated in order."""
    numbers = distinct(wanted.rng, 4, NUMBERS)
    start = "The list is:"
    text = haystack(
        wanted,
        "Somewhere in this text is a list of numbers. Remember it.",
        [f"The list is: {', '.join(numbers)}."],
        f"Repeat all {NUMBERS} numbers of the list in order.",
        start,
        depths=[wanted.depth],
    )
    return [
        Sample(
            turns=(text,),
            start=start,
            answers=tuple(numbers),
            length=wanted.tokens,
            depth=wanted.depth,
        )
    ]


def score(sample: Sample, completion: str) -> float:
    """Share of the numbers that stand at their place in the answer."""
    found = re.findall(r"\d+", completion)
    right: int = sum(a == b for a, b in zip(sample.answers, found, strict=False))
    return right / len(sample.answers)


TASK = Task(
    name="copying",
    summary=f"repeat a list of {NUMBERS} numbers from the text",
    max_tokens=8 * NUMBERS,
    make=make,
    score=score,
)
