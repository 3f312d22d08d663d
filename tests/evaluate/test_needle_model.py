"""An evaluation of the needle model, with the oracle in the engines' place: quick, and independent.

``tests/e2e/test_eval.py`` has the same through vLLM.
"""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.e2e.needle import MODEL, RECENT, SINK
from tests.oracle import Oracle
from vllm_duo.evaluate import run as module
from vllm_duo.evaluate.run import evaluate
from vllm_duo.evaluate.settings import EvalSettings
from vllm_duo.evaluate.tokenizer import load_tokenizer
from vllm_duo.heads import HeadPattern

ANSWER_TOKENS = 6  # five digits and the full stop
PATTERN = HeadPattern.load(MODEL / "duo_pattern")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture
def evaluated(monkeypatch, tmp_path, tokenizer):
    """Evaluates a pattern at one sparsity."""

    def answers_of(name, job, folder):
        duo = job["engine"].get("additional_config", {}).get("duo")
        selection = PATTERN.select(sparsity=0.0)
        if duo is not None:
            selection = HeadPattern.load(duo["pattern"]).select(sparsity=duo["sparsity"])
        oracle = Oracle(MODEL, selection.retrieval, SINK, RECENT)

        def answer(prompt: str) -> str:
            tokens = tokenizer.encode(prompt).ids
            start = len(tokens)
            for _ in range(ANSWER_TOKENS):
                tokens.append(int(oracle.logprobs(tokens)[-1].argmax()))
            return tokenizer.decode(tokens[start:])

        return {"rounds": [[answer(q["prompt"]) for q in asked] for asked in job["rounds"]]}

    monkeypatch.setattr(module, "answers_of", answers_of)

    def evaluated(pattern, sparsity) -> dict:
        count_tokens, vocabulary = load_tokenizer(str(MODEL))
        settings = EvalSettings(
            model=str(MODEL),
            pattern=str(pattern),
            sparsities=(sparsity,),
            tasks=("needle", "multi-key"),
            perplexity=False,
            lengths=(256,),
            depths=(0.1, 0.5),
            samples=8,
        )
        found = evaluate(settings, tmp_path, count_tokens=count_tokens, vocabulary=vocabulary)
        return {
            name: side["verdict"]
            for name, task in found["tasks"].items()
            for side in task["duo"].values()
        }

    return evaluated


def test_good_pattern_loses_nothing_at_half(evaluated):
    verdicts = evaluated(MODEL / "duo_pattern", 0.5)
    assert verdicts["needle"]["kind"] == "within_noise", verdicts
    assert verdicts["needle"]["full"] == 1
    # The model was trained on one pass key only.
    assert verdicts["multi-key"]["kind"] == "cannot_do", verdicts


def test_its_best_heads_streaming_is_found(evaluated, tmp_path):
    HeadPattern(1 - np.clip(PATTERN.values, 0, 1), PATTERN.metadata).save(tmp_path / "damaged")
    verdicts = evaluated(tmp_path / "damaged", 0.25)
    assert verdicts["needle"]["kind"] == "lost", verdicts
    assert verdicts["needle"]["loss"] >= 0.9
