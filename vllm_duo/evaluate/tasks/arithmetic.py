"""``arithmetic``: a chain of sums, worked out step by step in a long answer."""

from __future__ import annotations

import re

from vllm_duo.evaluate.task import Sample, Task, Wanted, haystack

STEPS = 12


def make(wanted: Wanted) -> list[Sample]:
    """``STEPS`` sums through the text; the answer names every value on the way."""
    value = wanted.rng.randint(1, 9)
    facts, values = [f"x0 is {value}."], [value]
    for step in range(1, STEPS + 1):
        amount = wanted.rng.randint(1, 9)
        less = value > amount and wanted.rng.random() < 0.5
        value += -amount if less else amount
        facts.append(f"x{step} is x{step - 1} {'minus' if less else 'plus'} {amount}.")
        values.append(value)
    start = f"x0 = {values[0]}, x1 ="
    text = haystack(
        wanted,
        "This text defines numbers, each from the one before it. Work them out.",
        facts,
        f"Write down the values of x0 to x{STEPS} in order.",
        start,
    )
    answers = tuple(str(number) for number in values[1:])
    return [Sample(turns=(text,), start=start, answers=answers, length=wanted.tokens)]


def score(sample: Sample, completion: str) -> float:
    """Share of the values that are right up to the first wrong one."""
    found = re.findall(r"(?<![A-Za-z0-9])-?\d+", completion)
    for place, answer in enumerate(sample.answers):
        if place >= len(found) or found[place] != answer:
            return place / len(sample.answers)
    return 1.0


TASK = Task(
    name="arithmetic",
    summary=f"a chain of {STEPS} sums through the text, worked out step by step",
    max_tokens=12 * STEPS,
    make=make,
    score=score,
)
