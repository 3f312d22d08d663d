"""Suites of lm-eval: which scores are taken, how they are paired, which engines are asked."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from transformers import AutoTokenizer

from tests.evaluate.chat_models import CHATML, copy_needle
from tests.evaluate.own_suite import SUITE, write_suite
from tests.evaluate.test_run import settings_of
from tests.evaluate.test_tasks import count_words
from vllm_duo.evaluate import run as module
from vllm_duo.evaluate.report import notes_on_prompts
from vllm_duo.evaluate.run import evaluate
from vllm_duo.evaluate.suites import compared, run_suites, scores_of


def lm_eval_stub() -> ModuleType:
    """Stands in for lm-eval where it is only looked for."""
    stub = ModuleType("lm_eval")
    stub.__spec__ = ModuleSpec("lm_eval", None)
    return stub


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
        monkeypatch.setitem(sys.modules, "lm_eval", lm_eval_stub())
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

    @pytest.mark.parametrize("changed", ["template", "task", "documents"])
    def test_other_templates_and_tasks_are_other_jobs(self, jobs, tmp_path, changed):
        """Under the same names: answers that were kept are not taken for theirs."""
        model = copy_needle(tmp_path / "model", CHATML)
        suite = write_suite(tmp_path, [{"prompt": "a", "answer": "1"}])
        given = {"model": str(model), "tasks": (), "suites": ("own",), "suites_path": str(suite)}
        before, after = [], []
        for kept in (before, before, after):
            if kept is after and changed == "template":
                (model / "chat_template.jinja").write_text("Read. " + CHATML)
            elif kept is after:
                files = {"task": suite / f"{SUITE}.yaml", "documents": tmp_path / "documents.jsonl"}
                with files[changed].open("a") as file:
                    file.write("\n")
            results = self.evaluate(tmp_path / "out", suites_chat=True, **given)
            kept.append((dict(jobs), results["chat_template"]))
        assert before[0] == before[1]
        for name in ("full-suites", "duo-0.5-suites"):
            assert before[0][0][name] != after[0][0][name]
        assert (before[0][1] != after[0][1]) == (changed == "template")

    def test_the_template_of_suites_alone_is_recorded_and_told(self, jobs, tmp_path):
        given = {
            "tasks": (),
            "suites": ("maths",),
            "model": str(copy_needle(tmp_path / "m", CHATML)),
        }
        plain = self.evaluate(tmp_path, **given)
        chat = self.evaluate(tmp_path, suites_chat=True, **given)
        assert plain["chat_template"] is None
        assert notes_on_prompts(plain) == []
        (told,) = notes_on_prompts(chat)
        assert told.startswith("Suites were asked through the model's chat template (SHA-256 ")
        assert chat["chat_template"] in told

    def test_a_template_for_suites_need_not_go_on_from_answers(self, jobs, tmp_path):
        """Suites have none that were begun; questions have."""
        own = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
        given = {"model": str(copy_needle(tmp_path / "m", own)), "suites": ("maths",)}
        assert self.evaluate(tmp_path, tasks=(), suites_chat=True, **given)["chat_template"]
        with pytest.raises(ValueError, match="an answer that was begun, got: "):
            self.evaluate(tmp_path, apply_chat_template=True, **given)


class TestRefused:
    """Before any engine starts."""

    @pytest.fixture
    def evaluate(self, monkeypatch, tmp_path):
        monkeypatch.setattr(module, "answers_of", lambda *_: pytest.fail("an engine was started"))

        def run(**given):
            settings = settings_of(tasks=(), suites=("maths",), **given)
            return evaluate(settings, tmp_path, count_tokens=count_words, vocabulary=10)

        return run

    def test_without_lm_eval(self, evaluate, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        for refused in (evaluate, lambda: run_suites({"engine": {}, "suites": {}})):
            with pytest.raises(RuntimeError, match="need lm-eval, which is not installed"):
                refused()

    @pytest.mark.parametrize(("kind", "found"), [("none", "nothing there"), ("file", "a file")])
    def test_no_folder_of_tasks(self, evaluate, monkeypatch, tmp_path, kind, found):
        monkeypatch.setitem(sys.modules, "lm_eval", lm_eval_stub())
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match=rf"--suites-path .*{kind}: .*, found {found}"):
            evaluate(suites_path=str(tmp_path / kind))

    def test_answers_among_the_tasks(self, evaluate, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "lm_eval", lm_eval_stub())
        for folder in (tmp_path, tmp_path.parent):
            with pytest.raises(
                ValueError, match=r"--out .* expected a folder outside --suites-path"
            ):
                evaluate(suites_path=str(folder))

    def test_a_model_without_a_chat_template(self, evaluate, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "lm_eval", lm_eval_stub())
        model = str(copy_needle(tmp_path / "model", None))
        for flag in ("suites_chat", "apply_chat_template"):
            with pytest.raises(
                ValueError, match=r"expected one in the tokenizer of .*, found none"
            ):
                evaluate(model=model, **{flag: True})

    @pytest.mark.parametrize(
        ("given", "flags"),
        [
            ({"suites_chat": True}, "--suites-chat"),
            ({"suites_limit": 3, "suites_fewshot": 0}, "--suites-limit and --suites-fewshot"),
        ],
    )
    def test_flags_of_suites_without_a_suite(self, given, flags):
        with pytest.raises(ValueError, match=f"got none: name some .--suites., or leave {flags}"):
            settings_of(**given)


class TestPrompts:
    """What lm-eval gives to an engine, which is made up."""

    @pytest.fixture
    def asked(self, monkeypatch, tmp_path):
        """The prompts' tokens; ``chat``: through the model's chat template."""
        backend = pytest.importorskip(
            "lm_eval.models.vllm_causallms", reason="needs lm-eval: pip install 'vllm-duo[suites]'"
        )
        prompts = []

        class Engine:
            def __init__(self, **settings):
                config = SimpleNamespace(max_model_len=1024)
                self.llm_engine = SimpleNamespace(model_config=config)

            def generate(self, requests, sampling_params, **others):
                prompts.extend(request["prompt_token_ids"] for request in requests)
                answer = SimpleNamespace(text=" 12345.", token_ids=[5])
                return [SimpleNamespace(outputs=[answer]) for _ in requests]

        monkeypatch.setattr(backend, "LLM", Engine)
        monkeypatch.setattr(backend, "resolve_hf_chat_template", lambda tokenizer, **_: None)
        model = str(copy_needle(tmp_path / "model", CHATML))
        suite = write_suite(tmp_path, [{"prompt": "The old man", "answer": "12345"}])

        def asked(**given):
            settings = settings_of(
                model=model, suites=(SUITE,), suites_path=str(suite), tasks=(), **given
            )
            scores = run_suites({"engine": {"model": model}, "suites": settings.suites_job()})
            assert scores == {f"{SUITE}: exact_match": {"0": 1.0}}
            (prompt,) = prompts
            prompts.clear()
            return prompt

        return asked, AutoTokenizer.from_pretrained(model)

    @pytest.mark.parametrize("flag", ["suites_chat", "apply_chat_template"])
    def test_template_is_applied_with_special_tokens_once(self, asked, flag):
        run, tokenizer = asked
        expected = tokenizer.apply_chat_template(
            [{"role": "user", "content": "The old man"}], add_generation_prompt=True
        )["input_ids"]
        tokens = run(**{flag: True})
        assert tokens == expected
        assert tokens.count(tokenizer.bos_token_id) == 1
        assert len(tokens) > len(run()) > 0

    def test_plain_text_has_the_special_tokens_of_the_tokenizer(self, asked):
        run, tokenizer = asked
        assert run() == tokenizer("The old man")["input_ids"]
