"""``common-words``: the words that a long list repeats most (RULER, arXiv:2404.06654)."""

from __future__ import annotations

from vllm_duo.evaluate.passkey import SLOTS
from vllm_duo.evaluate.task import Sample, Task, Wanted, share_found

COMMON = 3
REPEATS = 6
"""How many times as often the common words stand in the list."""

INTRODUCTION = "Below is a list of words. Some of them come more often than the others."
QUESTION = f"Which {COMMON} words come most often?"
START = f"The {COMMON} most frequent words are"


def make(wanted: Wanted) -> list[Sample]:
    """A numbered list as long as fits, in which ``COMMON`` words come ``REPEATS`` times as often.

    Raises:
        ValueError: the length does not hold a list that has the common words twice.
    """
    words = [word for key in ("object", "place", "person") for word in SLOTS[key]]
    wanted.rng.shuffle(words)
    common, others = words[:COMMON], words[COMMON:]
    rounds = [*common * REPEATS, *others]
    prompts = wanted.prompts
    listed: list[str] = []
    budget = wanted.tokens - prompts.count((f"{INTRODUCTION} {QUESTION}",), START)
    while True:
        wanted.rng.shuffle(rounds)
        for word in rounds:
            item = f"{len(listed) + 1}. {word}"
            budget -= prompts.count_text(" " + item)
            if budget < 0:
                break
            listed.append(item)
        if budget < 0:
            break
    if len(listed) < 2 * COMMON * REPEATS:
        raise ValueError(
            f"the list has room for {len(listed)} words in {wanted.tokens} tokens, expected at least "
            f"{2 * COMMON * REPEATS}: ask for longer prompts (--lengths)"
        )
    while True:
        text = " ".join([INTRODUCTION, *listed, QUESTION])
        if prompts.count((text,), START) <= wanted.tokens:
            return [Sample(turns=(text,), start=START, answers=tuple(common), length=wanted.tokens)]
        listed.pop()


TASK = Task(
    name="common-words",
    summary=f"the {COMMON} words that a long list repeats most",
    max_tokens=24,
    make=make,
    score=share_found,
)
