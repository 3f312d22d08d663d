"""A seeded mix of pass-key requests over the OpenAI API, many in flight, some of them broken off."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

from openai import AsyncOpenAI

from tests.e2e.needle import count_tokens
from vllm_duo.evaluate.passkey import (
    KEY_PREFIX,
    QUESTION,
    PasskeyPrompt,
    is_correct,
    make_prompt,
    make_sentence,
)

REQUEST_TIMEOUT_S = 240
"""A request that takes longer hangs: the whole queue of 32 takes some 20 seconds."""

# Shares of the kinds in each wave, in turn. Long prompts wait for room and let few others in; many
# growing answers run the pool dry; only where it has room to spare are prefixes stored and hit.
WAVES = (
    {"long": 4, "shared": 2, "gone in prompt": 3, "gone in answer": 1},
    {"talker": 8, "short": 4, "two": 1, "gone in answer": 3},
    {"short": 4, "shared": 6, "two": 2, "gone in answer": 1},
)
WAVE = 40
"""Requests of a wave."""
DOCUMENTS = 6
"""Shared prefixes; a new one takes the place of the oldest with every wave."""


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        kind: see ``WAVES``.
        prompt: the text and its pass key.
        leave_after: when the client goes: tokens of the answer, or seconds in the prompt.
    """

    kind: str
    prompt: PasskeyPrompt
    leave_after: float = 0.0

    @property
    def max_tokens(self) -> int:
        """A client that goes reads more slowly than a server writes: much must be left by then."""
        return {"talker": 160, "gone in answer": 1500, "gone in prompt": 600}.get(self.kind, 12)


@dataclass
class Report:
    """What came of the requests."""

    kinds: Counter = field(default_factory=Counter)
    right: int = 0
    wrong: list = field(default_factory=list)
    gone: int = 0


def make_questions(count: int, seed: int) -> list[Question]:
    """``count`` requests, wave by wave; each has a pass key of its own, or that of its document."""
    rng = random.Random(seed)
    documents = [_prompt(rng, 600, 1100) for _ in range(DOCUMENTS)]
    questions = []
    while len(questions) < count:
        wave = len(questions) // WAVE
        if len(questions) % WAVE == 0:
            documents[wave % DOCUMENTS] = _prompt(rng, 600, 1100)
        shares = WAVES[wave % len(WAVES)]
        (kind,) = rng.choices([*shares], [*shares.values()])
        questions.append(_question(rng, kind, documents))
    return questions


def _question(rng: random.Random, kind: str, documents: list[PasskeyPrompt]) -> Question:
    if kind == "shared":
        return Question(kind, _continued(rng, rng.choice(documents)))
    if kind in ("long", "gone in prompt"):
        return Question(kind, _prompt(rng, 900, 2000), rng.uniform(0.02, 2.0))
    if kind == "gone in answer":
        return Question(kind, _prompt(rng, 60, 400), rng.randrange(1, 150))
    return Question(kind, _prompt(rng, 60, 400))


def _prompt(rng: random.Random, low: int, high: int) -> PasskeyPrompt:
    return make_prompt(rng.randrange(low, high), rng=rng, count_tokens=count_tokens)


def _continued(rng: random.Random, document: PasskeyPrompt) -> PasskeyPrompt:
    """The same text up to its question, then a few sentences of its own and the question."""
    body = document.text[: document.text.rindex(QUESTION)]
    own = " ".join(make_sentence(rng) for _ in range(rng.randrange(1, 8)))
    text = f"{body}{own} {QUESTION} {KEY_PREFIX}"
    return PasskeyPrompt(
        text, document.answer, document.depth, count_tokens(text), document.key_tokens
    )


async def ask_all(base_url: str, questions: list[Question], concurrency: int) -> Report:
    """Ask all questions, ``concurrency`` at any time.

    Raises:
        TimeoutError: a request hangs.
    """
    report, waiting = Report(), iter(questions)

    async def work() -> None:
        for question in waiting:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                answers = await _ask(client, question)
            report.kinds[question.kind] += 1
            if answers is None:
                report.gone += 1
            elif all(is_correct(question.prompt, answer) for answer in answers):
                report.right += 1
            else:
                report.wrong.append((question, answers))

    async with (
        AsyncOpenAI(
            base_url=f"{base_url}/v1", api_key="none", max_retries=0, timeout=REQUEST_TIMEOUT_S
        ) as client,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(concurrency):
            group.create_task(work())
    return report


async def _ask(client: AsyncOpenAI, question: Question) -> list[str] | None:
    """The answers, or None where the client went before them."""
    request = {
        "model": "needle",
        "prompt": question.prompt.text,
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "extra_body": {"ignore_eos": question.max_tokens > 12},
    }
    if question.kind == "two":
        # vLLM refuses n > 1 at temperature 0; of one candidate there is nothing to sample.
        request |= {"n": 2, "temperature": 1, "extra_body": {"top_k": 1}}
    if question.kind == "gone in answer":
        stream = await client.completions.create(**request, stream=True)
        seen = 0
        async for _ in stream:
            seen += 1
            if seen > question.leave_after:
                break
        await stream.close()
        return None
    patience = question.leave_after if question.kind == "gone in prompt" else None
    try:
        async with asyncio.timeout(patience):
            answer = await client.completions.create(**request)
    except TimeoutError:
        if patience is None:
            raise
        return None
    return [choice.text for choice in answer.choices]
