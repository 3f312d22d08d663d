"""The questions of an evaluation, the same for every engine."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

from vllm_duo.evaluate import perplexity
from vllm_duo.evaluate.prompts import CountTokens, Prompts
from vllm_duo.evaluate.settings import EvalSettings
from vllm_duo.evaluate.task import Sample, Wanted
from vllm_duo.evaluate.tasks import TASKS


@dataclass(frozen=True, kw_only=True)
class Question:
    """A sample and its place in the run: ``pair`` names it on both sides."""

    task: str
    sample: Sample


@dataclass(frozen=True, kw_only=True)
class Questions:
    """All of a run.

    Attributes:
        rounds: by turn.
        texts: for perplexity.
        skipped: per task, the lengths that it does not fit, and why.
    """

    rounds: list[list[Question]]
    texts: list[str]
    skipped: dict[str, dict[int, str]]


def make_questions(
    settings: EvalSettings, prompts: Prompts, count_tokens: CountTokens
) -> Questions:
    """Make all samples; the same settings and tokenizer give the same.

    Args:
        settings: of the run.
        prompts: measures the questions.
        count_tokens: measures the texts for perplexity.
    """
    rounds: defaultdict[int, list[Question]] = defaultdict(list)
    skipped: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for name in settings.tasks:
        for length in settings.lengths:
            rng = random.Random(f"{name} {length} {settings.seed}")
            for index in range(settings.samples):
                depth = settings.depths[index % len(settings.depths)]
                wanted = Wanted(tokens=length, depth=depth, rng=rng, prompts=prompts)
                try:
                    samples = TASKS[name].make(wanted)
                except ValueError as error:
                    skipped[name][length] = str(error)
                    break
                for sample in samples:
                    rounds[sample.turn].append(Question(task=name, sample=sample))
    texts = []
    if settings.perplexity:
        texts = perplexity.make_texts(max(settings.lengths), settings.seed, count_tokens)
    return Questions(
        rounds=[rounds[turn] for turn in sorted(rounds)], texts=texts, skipped=dict(skipped)
    )
