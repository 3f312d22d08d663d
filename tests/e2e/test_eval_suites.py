"""A suite of lm-eval over local documents, asked through vLLM with both kinds of attention."""

from __future__ import annotations

import json
import random

import pytest

from tests.cli_run import run  # noqa: F401 - a fixture
from tests.e2e.needle import MODEL
from tests.evaluate.test_run import settings_of
from tests.evaluate.test_tasks import count_words
from vllm_duo.evaluate.passkey import make_prompt
from vllm_duo.evaluate.suites import run_suites

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'vllm-duo[suites]'")
pytestmark = [pytest.mark.engine, pytest.mark.slow]

YAML = """\
task: own_keys
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
filter_list:
  - name: digits
    filter:
      - {function: regex, regex_pattern: "([0-9]+)"}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def suite(tmp_path):
    """A folder with a task of pass keys over local documents."""
    rng = random.Random(5)
    prompts = [make_prompt(400, rng=rng, count_tokens=count_words) for _ in range(12)]
    documents = tmp_path / "documents.jsonl"
    rows = [json.dumps({"prompt": p.text, "answer": p.answer}) for p in prompts]
    documents.write_text("\n".join(rows) + "\n")
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "own_keys.yaml").write_text(YAML.replace("FILE", str(documents)))
    return folder


def test_keys_are_found_by_both_sides(run, suite, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    code, printed, errors = run(
        *("eval", str(MODEL), "--tasks", "none", "--no-perplexity", "--sparsity", "0.5"),
        *("--suites", "own_keys", "--suites-path", str(suite), "--suites-limit", "10"),
        *("--out", str(out)),
        *("--engine-args", '{"dtype": "float32", "enforce_eager": true, "max_model_len": 1024}'),
    )
    assert code == 0, errors
    (task,) = json.loads((out / "results.json").read_text())["tasks"].items()
    name, found = task
    assert name == "own_keys: exact_match"
    assert found["full"]["samples"] == 10
    assert found["full"]["score"] >= 0.9
    assert found["duo"]["duo-0.5"]["verdict"]["kind"] == "within_noise"
    assert "own_keys" in printed


def test_unknown_names(suite):
    job = {"engine": {"model": str(MODEL)}, "suites": settings_of(suites=("no",)).suites_job()}
    with pytest.raises(ValueError, match="expected names of lm-eval's tasks, got no"):
        run_suites(job)
