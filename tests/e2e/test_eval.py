"""``vllm-duo eval`` on the needle model through vLLM: a good pattern, and one that is damaged."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.e2e.needle import MODEL
from tests.evaluate.chat_models import copy_needle
from vllm_duo.evaluate.run import evaluate
from vllm_duo.evaluate.settings import EvalSettings
from vllm_duo.evaluate.tokenizer import load_tokenizer

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TASKS = ("needle", "multi-value")
ENGINE = {"dtype": "float32", "enforce_eager": True}


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
            engine=ENGINE,
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


def test_chat_template_that_only_joins_messages_changes_no_answer(good, tmp_path):
    """The needle model's own: the engines get the tokens of the plain questions, and answer alike."""
    found = through_template(MODEL, tmp_path, tasks=TASKS, lengths=(512, 1024), samples=20)
    for side in ("full", "duo-0.5"):
        rows = [row for row in found["samples"][side] if row["task"] == "needle"]
        assert rows == [row for row in good["samples"][side] if row["task"] == "needle"]
    assert found["chat_template"] is not None


def test_chat_template_reaches_the_engines(tmp_path):
    """One that puts a sentence before each question: what was asked begins with it, and fits."""
    words = "In the evening Anna found the green lamp."
    template = (
        "{{ bos_token }}{% for m in messages %}{% if not loop.first %} {% endif %}"
        f"{{% if m.role == 'user' %}}{words} {{% endif %}}{{{{ m.content | trim }}}}{{% endfor %}}"
    )
    model = copy_needle(tmp_path / "model", template)
    found = through_template(
        model, tmp_path / "run", tasks=("needle", "multi-turn"), lengths=(512,), samples=5
    )
    (job,) = (tmp_path / "run").glob("duo-0.5-*.job.json")
    first, *later = json.loads(job.read_text())["rounds"]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    for question in first:
        assert tokenizer.decode(question["prompt_token_ids"]).startswith(words)
        assert len(question["prompt_token_ids"]) <= 512
    assert len(later) == 2
    for turn, asked in enumerate(later, start=1):
        for question in asked:
            assert tokenizer.decode(question["prompt_token_ids"]).count(words) == turn + 1
    for side in ("full", "duo-0.5"):
        rows = found["samples"][side]
        assert len(rows) == 5 + 3 * 5
        # The model does not mind the sentence: it reads as one of the text.
        right = [row["score"] for row in rows if row["task"] == "needle"]
        assert sum(right) >= 4


def through_template(model, folder, **given):
    """Evaluates a model at a half, its questions through its chat template."""
    count_tokens, vocabulary = load_tokenizer(str(model))
    settings = EvalSettings(
        model=str(model),
        sparsities=(0.5,),
        perplexity=False,
        apply_chat_template=True,
        engine=ENGINE,
        **given,
    )
    return evaluate(settings, folder, count_tokens=count_tokens, vocabulary=vocabulary)


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
