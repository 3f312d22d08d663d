"""``vllm-duo eval``: bad input before any engine starts, and results with engines that are made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.evaluate.chat_models import copy_needle
from vllm_duo.evaluate import run as module

NEEDLE = str(Path(__file__).resolve().parents[2] / "models" / "needle")


@pytest.fixture
def engines(monkeypatch):
    """Engines that answer nothing with duo, and the word that is looked for with full attention."""
    started = []

    def answers_of(name, job, folder):
        started.append(name)
        answers = ["" if name != "full" else " 1." for _ in job["rounds"][0]]
        return {"rounds": [answers], "logprobs": []}

    monkeypatch.setattr(module, "answers_of", answers_of)
    needle = module.TASKS["needle"]
    scored = type(needle)(**(vars(needle) | {"score": lambda _, text: float(text == " 1.")}))
    monkeypatch.setitem(module.TASKS, "needle", scored)
    return started


def arguments(out: Path, *more: str) -> list[str]:
    small = ["--tasks", "needle", "--lengths", "256", "--samples", "10", "--no-perplexity"]
    return ["eval", NEEDLE, "--out", str(out), *small, *more]


def test_results_are_saved_and_told(run, engines, tmp_path):
    code, out, _ = run(*arguments(tmp_path / "new" / "run", "--sparsity", "0.25,0.5"))
    assert code == 0
    assert engines == ["full", "duo-0.25", "duo-0.5"]
    assert "lost 100.0 points" in " ".join(out.split())
    results = json.loads((tmp_path / "new" / "run" / "results.json").read_text())
    assert results["settings"]["lengths"] == [256]
    assert results["tasks"]["needle"]["duo"]["duo-0.5"]["verdict"]["kind"] == "lost"
    assert len(results["samples"]["full"]) == 10


def test_exit_code_on_demand(run, engines, tmp_path):
    assert run(*arguments(tmp_path, "--fail-on-loss"))[0] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tasks", "needle,haystack"], "tasks: expected some of needle, multi-key"),
        (["--sparsity", "half"], "--sparsity: expected numbers separated by commas, got 'half'"),
        (["--sparsity", "1.5"], "less than or equal to 1"),
        (["--lengths", "4"], "greater than or equal to 16"),
        (["--lengths", "100.5"], "valid integer"),
        (["--samples", "0"], "samples"),
        (["--engine-args", "dtype=float32"], "--engine-args: expected a JSON object as in"),
        (["--lengths", "20"], "no task fits any of the lengths"),
    ],
)
def test_bad_input(run, engines, tmp_path, given, message):
    code, _, stderr = run(*arguments(tmp_path, *given))
    assert code == 2
    assert message in stderr
    assert engines == []


def test_chat_template_is_recorded(run, engines, tmp_path):
    code, out, _ = run(*arguments(tmp_path, "--sparsity", "0.5", "--apply-chat-template"))
    assert code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["apply_chat_template"]
    assert results["chat_template"] in out


def test_chat_template_that_is_not_there(run, engines, tmp_path):
    model = copy_needle(tmp_path / "model", None)
    small = ("--tasks", "needle", "--lengths", "256")
    code, _, stderr = run(
        *("eval", str(model), "--out", str(tmp_path / "out"), *small, "--apply-chat-template")
    )
    assert code == 2
    assert "found none: leave --apply-chat-template and --suites-chat out" in stderr
    assert engines == []


def test_no_such_model(run, engines, tmp_path):
    code, _, stderr = run("eval", str(tmp_path / "nothing"), "--out", str(tmp_path / "out"))
    assert code == 2
    assert "tokenizer.json, found none" in stderr
    assert engines == []
