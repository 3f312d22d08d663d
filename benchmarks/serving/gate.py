"""The correctness gate: no figures while duo's answers are wrong.

Duo with every head a retrieval head must give stock's greedy tokens; where prompts of the points begin
alike it must do so when it resumes at what the prefix cache kept, too. And with the sparsities that are
measured, it must find each pass key that stock finds. Asked one by one, without load.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.serving import api
from benchmarks.serving.api import Answer
from benchmarks.serving.prompts import Texts
from benchmarks.serving.settings import GATE_SIDE, STOCK, Settings
from benchmarks.serving.workloads import PASSKEY_OUTPUT_TOKENS, shared_prompts
from vllm_duo.evaluate.passkey import first_number, make_prompt
from vllm_duo.report.serve_results import Gate, GateSide

COMPARED_TOKENS = 16
TOP = 5
PROMPT_TOKENS = 512
JUDGED_FROM = 0.5
"""A model that finds fewer pass keys with full attention is not asked to find them."""

Ask = Callable[[str, str, int, int], Answer]
"""Side, prompt, tokens of the answer, top log-probabilities."""


@dataclass(frozen=True)
class Question:
    """One prompt of the gate; ``key`` is the pass key, empty for random text."""

    prompt: str
    key: str = ""


def make_questions(settings: Settings, texts: Texts) -> list[Question]:
    """Random texts and pass keys in turns, as long as the points' prompts but no longer than needed.

    Then, for each workload whose prompts begin alike, one prefix, conversation or document.

    Raises:
        ValueError: such prompts cannot be made so short, or the documents do not hold as much.
    """
    rng = random.Random(f"{settings.seed} gate")
    lengths = [p.prompt_tokens or PROMPT_TOKENS for p in settings.points]
    tokens = min(PROMPT_TOKENS, *lengths)
    made = []
    for _ in range(settings.gate_prompts):
        made.append(Question(texts.random(tokens - texts.special_tokens, rng)))
        passkey = make_prompt(tokens, rng=rng, count_tokens=texts.count)
        made.append(Question(passkey.text, passkey.answer))
    for workload in dict.fromkeys(point.workload for point in settings.points):
        shortest = min(p.prompt_tokens for p in settings.points if p.workload == workload)
        size = min(PROMPT_TOKENS, shortest)
        made += map(Question, shared_prompts(settings, workload, size, texts, rng))
    return made


def check(settings: Settings, questions: Sequence[Question], ask: Ask) -> Gate:
    """Ask all sides, one after the other.

    Args:
        settings: of the benchmark.
        questions: for all of them.
        ask: gets a greedy answer from a side.
    """
    stock = [ask(STOCK, q.prompt, COMPARED_TOKENS, TOP) for q in questions]
    plain = [ask(GATE_SIDE, q.prompt, COMPARED_TOKENS, 0) for q in questions]
    ties, compared, differences = 0, 0, []
    for index, (expected, got) in enumerate(zip(stock, plain, strict=True)):
        same, gap = first_difference(expected, got)
        compared += same
        if gap is None:
            continue
        if gap <= settings.gate_tie_nats:
            ties += 1
            continue
        differences.append(
            f"question {index}, token {same}: expected stock's token {expected.tokens[same]}, got "
            f"{got.tokens[same]} from duo with every head a retrieval head; stock's log-probabilities "
            f"of the two are {gap:.3g} nats apart"
        )
    passkeys = _passkeys(settings, questions, stock, ask)
    judged = passkeys[0].asked > 0 and passkeys[0].right >= JUDGED_FROM * passkeys[0].asked
    lost = judged and any(side.lost for side in passkeys)
    return Gate(
        passed=not differences and not lost,
        compared_tokens=compared,
        near_ties=ties,
        differences=differences,
        passkeys=passkeys,
        judges_passkeys=judged,
    )


def first_difference(expected: Answer, got: Answer) -> tuple[int, float | None]:
    """Tokens that agree, and how likelier stock found its own next token; None: all agree.

    A token that is not among stock's likeliest is infinitely far.
    """
    pairs = zip(expected.tokens, got.tokens, strict=True)
    for index, (own, other) in enumerate(pairs):
        if own != other:
            top = expected.top[index]
            if own not in top or other not in top:
                return index, float("inf")
            return index, abs(top[own] - top[other])
    return len(expected.tokens), None


def _passkeys(
    settings: Settings, questions: Sequence[Question], stock: Sequence[Answer], ask: Ask
) -> list[GateSide]:
    keyed = [(q, answer) for q, answer in zip(questions, stock, strict=True) if q.key]
    stock_right = [first_number(answer.text) == q.key for q, answer in keyed]
    sides = [GateSide(side=STOCK, asked=len(keyed), right=sum(stock_right), lost=0)]
    for side in settings.sides[1:]:
        right = [
            first_number(ask(side, q.prompt, PASSKEY_OUTPUT_TOKENS, 0).text) == q.key
            for q, _ in keyed
        ]
        lost = sum(before and not now for before, now in zip(stock_right, right, strict=True))
        sides.append(GateSide(side=side, asked=len(keyed), right=sum(right), lost=lost))
    return sides


def ask_server(url: str, prompt: str, max_tokens: int, top: int) -> Answer:
    """``Ask`` for one server."""
    return api.complete(url, prompt, max_tokens, top=top)


def told(gate: Gate) -> str:
    """Why a gate is red, in words."""
    reasons = list(gate.differences[:5])
    reasons += [
        f"{side.side}: expected the {gate.passkeys[0].right} pass keys that stock finds, got "
        f"{side.lost} of them wrong"
        for side in gate.passkeys
        if gate.judges_passkeys and side.lost
    ]
    return (
        "the correctness gate is red, so nothing is measured:\n  "
        + "\n  ".join(reasons)
        + "\nWrong pass keys: lower --sparsity, or use another --pattern. Other tokens with bfloat16 "
        "or float16: rounding swaps tokens that are nearly equal, so allow for it (--gate-tie-nats) or "
        'serve in float32 (--server-args="--dtype float32")'
    )
