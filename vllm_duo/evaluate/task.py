"""What a task is, and the haystack that most of them hide something in."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_duo.evaluate.passkey import make_sentence
from vllm_duo.evaluate.prompts import Prompts


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question.

    Attributes:
        turns: what user and assistant say in turn, from the user to the user, who asks last.
        start: first words of the answer; the model goes on from them.
        answers: what the answer must hold.
        length: tokens asked for; the prompt has at most so many.
        depth: where the answer stands, 0 (start) to 1; None where that means nothing.
        turn: questions of later turns are asked after all of the earlier ones, and begin with the same
            text, so that they resume at what the cache kept.
    """

    turns: tuple[str, ...]
    start: str
    answers: tuple[str, ...]
    length: int
    depth: float | None = None
    turn: int = 0


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of a task: one sample, or one conversation.

    Attributes:
        tokens: length of the prompt, with special tokens and the chat template if one is applied.
        depth: where the answer is to stand, for tasks with one place; 0 to 1.
        rng: source of every choice.
        prompts: measures prompts as they will be asked.
    """

    tokens: int
    depth: float
    rng: random.Random
    prompts: Prompts


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    Attributes:
        name: on the command line and in results.
        summary: one line.
        max_tokens: tokens that an answer may take.
        make: samples of one length.
        score: 0 to 1 for a completion.
    """

    name: str
    summary: str
    max_tokens: int
    make: Callable[[Wanted], list[Sample]]
    score: Callable[[Sample, str], float]


def share_found(sample: Sample, completion: str) -> float:
    """Share of the answers that stand in the completion as whole words."""
    words = set(re.findall(r"\w+", completion))
    return sum(answer in words for answer in sample.answers) / len(sample.answers)


def haystack(
    wanted: Wanted,
    introduction: str,
    facts: Sequence[str],
    question: str,
    start: str,
    depths: Sequence[float] | None = None,
) -> str:
    """Filler sentences with the facts among them, in their order, and the question at the end.

    With ``start`` it makes a prompt of at most ``wanted.tokens`` that lacks about a sentence to them.

    Args:
        wanted: length and source of every choice.
        introduction: first sentence.
        facts: sentences to hide.
        question: last words.
        start: first words of the answer, not in what is returned.
        depths: 0 to 1 for each fact, ascending; None draws them.

    Raises:
        ValueError: the length does not hold the facts and the question.
    """
    prompts = wanted.prompts
    least = prompts.count((" ".join([introduction, *facts, question]),), start)
    budget = wanted.tokens - least
    if budget < 0:
        raise ValueError(
            f"this task needs at least {least} tokens with this tokenizer, got "
            f"{wanted.tokens}: ask for longer prompts (--lengths)"
        )
    filler: list[str] = []
    while True:
        sentence = make_sentence(wanted.rng)
        budget -= prompts.count_text(" " + sentence)
        if budget < 0:
            break
        filler.append(sentence)
    at = sorted(wanted.rng.random() for _ in facts) if depths is None else depths
    places = [int(depth * len(filler) + 0.5) for depth in at]
    while True:
        text = _joined(introduction, filler, facts, places, question)
        if prompts.count((text,), start) <= wanted.tokens or not filler:
            return text
        filler.pop()  # tokens do not add up exactly over sentences with every tokenizer


def _joined(
    introduction: str,
    filler: Sequence[str],
    facts: Sequence[str],
    places: Sequence[int],
    question: str,
) -> str:
    parts, start = [introduction], 0
    for fact, place in zip(facts, places, strict=True):
        parts += [*filler[start:place], fact]
        start = max(start, place)
    return " ".join([*parts, *filler[start:], question])


def distinct(rng: random.Random, digits: int, count: int) -> list[str]:
    """Numbers of so many digits, all different."""
    first = 10 ** (digits - 1)
    return [str(number) for number in rng.sample(range(first, 10 * first), count)]
