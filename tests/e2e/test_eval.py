"""``vllm-duo eval`` on the needle model through vLLM: a good pattern, and one that is damaged."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.e2e.needle import MODEL
from vllm_duo.evaluate.run import evaluate
from vllm_duo.evaluate.settings import EvalSettings
from vllm_duo.evaluate.tokenizer import load_tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TASKS = ("needle", "multi-value")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Evaluates a pattern at one sparsity; full attention answers once for all."""
    folder = tmp_path_factory.mktemp("eval")
    count_tokens, vocabulary = load_tokenizer(str(MODEL))

    def evaluated(pattern, sparsity):
        settings = EvalSettings(
            model=str(MODEL),
            pattern=str(pattern),
            sparsities=(sparsity,),
            tasks=TASKS,
            lengths=(512, 1024),
            samples=20,
            engine={"dtype": "float32", "enforce_eager": True},
        )
        results = evaluate(settings, folder, count_tokens=count_tokens, vocabulary=vocabulary)
        return results, len(list(folder.glob("full-*.answers.json")))

    return evaluated


@pytest.fixture(scope="module")
def good(evaluated):
    return evaluated(MODEL / "duo_pattern", 0.5)[0]


def test_good_pattern_loses_nothing_at_half(good):
    verdict = good["tasks"]["needle"]["duo"]["duo-0.5"]["verdict"]
    assert verdict["kind"] == "within_noise", verdict
    assert verdict["full"] >= 0.95


def test_task_that_the_model_cannot_do_gets_no_verdict(good):
    assert good["tasks"]["multi-value"]["duo"]["duo-0.5"]["verdict"]["kind"] == "cannot_do"


def test_its_best_heads_streaming_is_found(evaluated, good, tmp_path):
    shutil.copytree(MODEL / "duo_pattern", tmp_path / "damaged")
    table = tmp_path / "damaged" / "full_attention_heads.tsv"
    np.savetxt(table, 1 - np.clip(np.loadtxt(table), 0, 1), delimiter="\t")
    results, full_engines = evaluated(tmp_path / "damaged", 0.25)
    needle = results["tasks"]["needle"]["duo"]["duo-0.25"]
    assert needle["verdict"]["kind"] == "lost", needle["verdict"]
    assert needle["verdict"]["loss"] >= 0.5
    # Where a streaming head sees the key itself, at the end of the text, nothing is lost.
    by_depth = {(c["depth"], c["length"]): c["score"] for c in needle["by_depth_and_length"]}
    assert by_depth[0.5, 1024] == 0
    assert full_engines == 1
