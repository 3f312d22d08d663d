"""A suite of lm-eval over local documents, asked through vLLM with both kinds of attention."""

from __future__ import annotations

import json
import random

import pytest

from tests.cli_run import run  # noqa: F401 - a fixture
from tests.e2e.needle import MODEL
from tests.evaluate.chat_models import copy_needle
from tests.evaluate.own_suite import SUITE, write_suite
from tests.evaluate.test_run import settings_of
from tests.evaluate.test_tasks import count_words
from vllm_duo.evaluate.passkey import KEY_PREFIX, QUESTION, make_prompt, make_sentence
from vllm_duo.evaluate.suites import run_suites
from vllm_duo.report.load import load_results
from vllm_duo.report.render import render

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'vllm-duo[suites]'")
pytestmark = [pytest.mark.engine, pytest.mark.slow]

SCORE = f"{SUITE}: exact_match"
KEY = "71234"
# Tells what no document does, and begins the answer: without it nobody can know the key.
TEMPLATE = (
    f"{{{{ bos_token }}}}{KEY_PREFIX} {KEY}. "
    "{% for m in messages %}{{ m.content | trim }} {% endfor %}"
    f"{{% if add_generation_prompt %}}{KEY_PREFIX}{{% endif %}}"
)


@pytest.fixture
def evaluate(run, tmp_path):  # noqa: F811
    """Runs ``vllm-duo eval`` on a suite alone: (exit code, what it printed, results)."""

    def evaluate(model, suite, *flags, limit=10):
        out = tmp_path / "run"
        code, printed, errors = run(
            *("eval", str(model), "--tasks", "none", "--no-perplexity", "--sparsity", "0.5"),
            *("--suites", SUITE, "--suites-path", str(suite), "--suites-limit", str(limit)),
            *("--out", str(out)),
            *(
                "--engine-args",
                '{"dtype": "float32", "enforce_eager": true, "max_model_len": 1024}',
            ),
            *flags,
        )
        file = out / "results.json"
        return code, printed + errors, json.loads(file.read_text()) if file.exists() else None

    return evaluate


@pytest.fixture
def suite(tmp_path):
    """A folder with a task of pass keys over local documents."""
    rng = random.Random(5)
    prompts = [make_prompt(400, rng=rng, count_tokens=count_words) for _ in range(12)]
    return write_suite(tmp_path, [{"prompt": p.text, "answer": p.answer} for p in prompts])


@pytest.fixture
def keyless(tmp_path):
    """Questions for a key that stands in no document."""
    rng = random.Random(6)
    texts = [" ".join(make_sentence(rng) for _ in range(40)) for _ in range(10)]
    return write_suite(tmp_path, [{"prompt": f"{t} {QUESTION}", "answer": KEY} for t in texts])


def test_keys_are_found_by_both_sides(evaluate, suite):
    code, printed, results = evaluate(MODEL, suite)
    assert code == 0, printed
    ((name, found),) = results["tasks"].items()
    assert name == SCORE
    assert found["full"]["samples"] == 10
    assert found["full"]["score"] >= 0.9
    assert found["duo"]["duo-0.5"]["verdict"]["kind"] == "within_noise"
    assert SUITE in printed


def test_an_instruct_model_is_asked_through_its_template(evaluate, keyless, tmp_path):
    """The template alone has the answer; the second run is in the folder of the first."""
    model = copy_needle(tmp_path / "instruct", TEMPLATE)
    code, printed, results = evaluate(model, keyless, "--suites-chat")
    assert code == 0, printed
    found = results["tasks"][SCORE]
    assert found["full"]["score"] >= 0.9
    assert found["duo"]["duo-0.5"]["score"] >= 0.9
    assert found["duo"]["duo-0.5"]["verdict"]["kind"] == "within_noise"
    told = f"chat template (SHA-256 {results['chat_template']}), other questions not."
    assert told in " ".join(printed.split())
    assert told in render(load_results([tmp_path / "run" / "results.json"]))

    code, printed, results = evaluate(model, keyless)
    assert code == 0, printed
    found = results["tasks"][SCORE]
    assert (found["full"]["score"], found["duo"]["duo-0.5"]["score"]) == (0, 0)
    assert found["duo"]["duo-0.5"]["verdict"]["kind"] == "cannot_do"
    assert results["chat_template"] is None
    assert "chat template" not in printed


@pytest.mark.parametrize("flag", ["--suites-chat", "--apply-chat-template"])
def test_a_model_without_a_template_is_refused_before_it_is_loaded(
    evaluate, keyless, tmp_path, flag
):
    model = copy_needle(tmp_path / "base", None)
    (model / "model.safetensors").unlink()
    code, printed, results = evaluate(model, keyless, flag)
    assert code == 2
    (line,) = printed.strip().splitlines()
    assert line.startswith(
        f"Error: chat template: expected one in the tokenizer of {str(model)!r}, "
    )
    assert "found none: leave --apply-chat-template and --suites-chat out" in line
    assert results is None
    assert not (tmp_path / "run" / "engines").exists()


def test_unknown_names(suite):
    job = {"engine": {"model": str(MODEL)}, "suites": settings_of(suites=("no",)).suites_job()}
    with pytest.raises(ValueError, match="expected names of lm-eval's tasks, got no"):
        run_suites(job)
