"""Suites of lm-eval: which scores are taken, how they are paired, which engines are asked."""

from __future__ import annotations

import sys

import pytest

from tests.evaluate.test_run import settings_of
from tests.evaluate.test_tasks import count_words
from vllm_duo.evaluate import run as module
from vllm_duo.evaluate.run import evaluate
from vllm_duo.evaluate.suites import compared, run_suites, scores_of


def sample(document, filter_name="none", **metrics):
    return {"doc_id": document, "filter": filter_name, "metrics": list(metrics), **metrics}


class TestScores:
    def test_shares_that_grow_with_quality_are_taken(self):
        samples = {
            "maths": [
                sample(3, acc=True, words=0.25, perplexity=0.5, f1=40.0, pair=(0, 1)),
                sample(7, acc=False, words=1.0, perplexity=0.1, f1=0.5, pair=(1, 1)),
            ]
        }
        better = dict.fromkeys(("acc", "words", "f1", "pair"), True) | {"perplexity": False}
        assert scores_of(samples, {"maths": better}) == {
            "maths: acc": {"3": 1, "7": 0},
            "maths: words": {"3": 0.25, "7": 1.0},
        }

    def test_filters_are_told_apart(self):
        samples = {"maths": [sample(1, name, acc=1.0) for name in ("strict", "flexible")]}
        found = scores_of(samples, {"maths": {"acc": True}})
        assert list(found) == ["maths, strict: acc", "maths, flexible: acc"]

    def test_a_metric_without_a_direction_is_left_out(self):
        assert scores_of({"maths": [sample(1, acc=1.0)]}, {"maths": {"acc": None}}) == {}
        assert scores_of({"maths": [sample(1, acc=1.0)]}, {}) == {}


FULL = {"maths: acc": {str(n): 1.0 for n in range(40)}}


class TestCompared:
    def verdict(self, scores):
        tasks = compared(FULL, {"duo-0.5": (0.5, {"maths: acc": scores})}, seed=0)
        return tasks["maths: acc"]["duo"]["duo-0.5"]["verdict"]["kind"]

    def test_pairs_are_of_one_document_whatever_their_order(self):
        same = dict(reversed(FULL["maths: acc"].items()))
        assert self.verdict(same) == "within_noise"
        assert self.verdict({n: float(int(n) > 20) for n in same}) == "lost"

    @pytest.mark.parametrize("scores", [{}, {"0": 1.0}, {str(n): 1.0 for n in range(1, 41)}])
    def test_other_documents(self, scores):
        with pytest.raises(RuntimeError, match="expected scores of the same 40 documents"):
            self.verdict(scores)


class TestRun:
    @pytest.fixture
    def jobs(self, monkeypatch):
        """Stands in for the engines; what each was asked."""
        jobs = {}

        def answers_of(name, job, folder):
            jobs[name] = job
            if "suites" in job:
                return {"suites": {"maths: acc": {str(n): 1.0 for n in range(20)}}}
            return {"rounds": [["" for _ in asked] for asked in job["rounds"]], "logprobs": []}

        monkeypatch.setattr(module, "answers_of", answers_of)
        return jobs

    def evaluate(self, folder, **given):
        return evaluate(settings_of(**given), folder, count_tokens=count_words, vocabulary=10)

    def test_engines_of_suites_are_like_the_others_but_for_the_length(self, jobs, tmp_path):
        results = self.evaluate(tmp_path, suites=("maths",), suites_limit=20, seed=3)
        assert list(jobs) == ["full", "full-suites", "duo-0.5", "duo-0.5-suites"]
        for side in ("full", "duo-0.5"):
            own = dict(jobs[side]["engine"])
            del own["max_model_len"]
            assert jobs[f"{side}-suites"]["engine"] == own
        job = jobs["full-suites"]["suites"]
        assert (job["tasks"], job["limit"], job["seed"]) == (["maths"], 20, 3)
        assert set(results["tasks"]) == {"needle", "multi-key", "maths: acc"}

    def test_suites_alone(self, jobs, tmp_path):
        results = self.evaluate(tmp_path, tasks=(), suites=("maths",))
        assert list(jobs) == ["full-suites", "duo-0.5-suites"]
        (task,) = results["tasks"].values()
        assert task["duo"]["duo-0.5"]["verdict"]["kind"] == "within_noise"


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RuntimeError, match="--suites need lm-eval, which is not installed"):
        run_suites({"engine": {}, "suites": {}})
