"""A run with engines that are made up: pairing, verdicts, what is kept and what is told."""

from __future__ import annotations

import json
import re

import pytest

from tests.e2e.needle import MODEL
from tests.evaluate.test_tasks import count_words
from vllm_duo.evaluate import engines
from vllm_duo.evaluate import run as module
from vllm_duo.evaluate.perplexity import compare
from vllm_duo.evaluate.prompts import PlainPrompts
from vllm_duo.evaluate.questions import make_questions
from vllm_duo.evaluate.report import tables
from vllm_duo.evaluate.run import engine_arguments, evaluate
from vllm_duo.evaluate.settings import EvalSettings

PROMPTS = PlainPrompts(count_words)
NEEDLE = r"The pass key is (\d{5})\."


def settings_of(**given) -> EvalSettings:
    defaults = {
        "model": str(MODEL),
        "sparsities": (0.5,),
        "tasks": ("needle", "multi-key"),
        "lengths": (200, 400),
        "samples": 10,
        "perplexity": False,
    }
    return EvalSettings(**(defaults | given))


@pytest.fixture
def evaluated(monkeypatch, tmp_path):
    """Runs an evaluation; ``answer(engine name, prompt)`` plays the model."""

    def evaluated(answer, **given) -> dict:
        def answers_of(name, job, folder):
            return {
                "rounds": [[answer(name, q["prompt"]) for q in asked] for asked in job["rounds"]],
                "logprobs": [[-1.0] * 100 for _ in job["texts"]],
            }

        monkeypatch.setattr(module, "answers_of", answers_of)
        return evaluate(settings_of(**given), tmp_path, count_tokens=count_words, vocabulary=1000)

    return evaluated


def finds_the_needle(name: str, prompt: str) -> str:
    found = re.search(NEEDLE, prompt)
    return f" {found[1]}." if found else " 12."


def verdicts(results: dict) -> dict[str, str]:
    return {
        name: side["verdict"]["kind"]
        for name, task in results["tasks"].items()
        for side in task["duo"].values()
    }


def test_good_pattern_and_a_task_that_the_model_cannot_do(evaluated):
    results = evaluated(finds_the_needle)
    assert verdicts(results) == {"needle": "within_noise", "multi-key": "cannot_do"}
    assert results["tasks"]["needle"]["full"]["score"] == 1


def test_damaged_pattern_is_told(evaluated):
    def answer(name, prompt):
        lost = name != "full" and prompt.index(re.search(NEEDLE, prompt)[1]) > len(prompt) / 3
        return "" if lost else finds_the_needle(name, prompt)

    results = evaluated(answer, tasks=("needle",))
    assert verdicts(results) == {"needle": "lost"}
    cells = results["tasks"]["needle"]["duo"]["duo-0.5"]["by_depth_and_length"]
    assert {cell["score"] for cell in cells if cell["depth"] == 0} == {1.0}
    assert {cell["score"] for cell in cells if cell["depth"] == 0.75} == {0.0}


def test_both_sides_are_asked_the_same(monkeypatch, tmp_path):
    jobs = {}

    def answers_of(name, job, folder):
        jobs[name] = job
        return {"rounds": [["" for _ in asked] for asked in job["rounds"]], "logprobs": []}

    monkeypatch.setattr(module, "answers_of", answers_of)
    heads = {
        "pattern": str(MODEL / "duo_pattern"),
        "sink_size": 4,
        "streaming_cache_dtype": "model",
    }
    given = settings_of(sparsities=(0.25, 0.5), **heads)
    evaluate(given, tmp_path, count_tokens=count_words, vocabulary=10)
    assert list(jobs) == ["full", "duo-0.25", "duo-0.5"]
    assert jobs["full"]["rounds"] == jobs["duo-0.25"]["rounds"] == jobs["duo-0.5"]["rounds"]
    assert "attention_backend" not in jobs["full"]["engine"]
    duo = jobs["duo-0.5"]["engine"]["additional_config"]["duo"]
    assert duo == {**heads, "sparsity": 0.5}
    masks = [jobs[name]["selection"]["mask_hash"] for name in ("duo-0.25", "duo-0.5")]
    assert len(set(masks)) == 2
    longest = max(count_words(q["prompt"]) + q["max_tokens"] for q in jobs["full"]["rounds"][0])
    assert jobs["full"]["engine"]["max_model_len"] >= longest


def test_pattern_of_another_model_is_refused_before_any_engine(evaluated):
    def answer(name, prompt):
        raise AssertionError("an engine was started")

    with pytest.raises(ValueError, match="head pattern has 32 layers, the model has 4"):
        evaluated(answer, pattern="Meta-Llama-3.1-8B-Instruct")


def test_engine_settings_of_the_user_win():
    arguments = engine_arguments(settings_of(engine={"dtype": "float32", "seed": 7}), 0.5, 100)
    assert (arguments["dtype"], arguments["seed"]) == ("float32", 7)


def test_a_quantised_cache_is_judged_against_the_models_own():
    settings = settings_of(engine={"kv_cache_dtype": "int4_per_token_head"})
    assert engine_arguments(settings, 0.5, 100)["kv_cache_dtype"] == "int4_per_token_head"
    assert "kv_cache_dtype" not in engine_arguments(settings, None, 100)
    assert settings.engine, "the settings themselves stay"


class TestSlidingWindows:
    """Of the model's own: the server of these questions must split the heads that users' servers do."""

    @pytest.fixture
    def slides(self, tmp_path):
        """A model whose first and third layers slide over 512 tokens."""
        config = json.loads((MODEL / "config.json").read_text())
        kinds = ["sliding_attention", "full_attention"] * 2
        own = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
        config |= own | {"sliding_window": 512, "layer_types": kinds}
        folder = tmp_path / "slides"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        return {"model": str(folder), "pattern": str(MODEL / "duo_pattern")}

    def test_questions_within_the_window_are_refused(self, slides, evaluated):
        told = "2 of 4 layers slide over 512 tokens .* got at most 412 tokens"  # 12 of the answer
        with pytest.raises(ValueError, match=told):
            evaluated(finds_the_needle, lengths=(200, 400), **slides)

    def test_longer_ones_are_asked(self, slides, evaluated):
        results = evaluated(finds_the_needle, lengths=(400, 700), **slides)
        assert results["tasks"]["needle"]["duo"]


def test_depths_are_asked_alike():
    questions = make_questions(settings_of(tasks=("needle",)), PROMPTS, count_words)
    depths = [q.sample.depth for q in questions.rounds[0]]
    assert {depths.count(depth) for depth in set(depths)} == {4}  # 10 samples, 5 depths, 2 lengths


def test_turns_come_in_rounds():
    questions = make_questions(settings_of(tasks=("multi-turn", "needle")), PROMPTS, count_words)
    assert [len(asked) for asked in questions.rounds] == [40, 20, 20]


def test_length_that_a_task_does_not_fit_is_told(evaluated):
    results = evaluated(finds_the_needle, tasks=("needle", "copying"), lengths=(100, 400))
    skipped = results["tasks"]["copying"]["skipped_lengths"]
    assert list(skipped) == [100]
    assert "needs at least" in skipped[100]
    assert results["tasks"]["needle"]["skipped_lengths"] == {}


def test_no_task_fits(evaluated):
    with pytest.raises(
        ValueError, match="no task fits any of the lengths: copying: this task needs"
    ):
        evaluated(finds_the_needle, tasks=("copying",), lengths=(50,))


def test_results_are_json_and_the_same_each_time(evaluated):
    first = json.dumps(evaluated(finds_the_needle, perplexity=True))
    assert first == json.dumps(evaluated(finds_the_needle, perplexity=True))


def test_tables_tell_every_verdict(evaluated):
    from io import StringIO

    from rich.console import Console

    results = evaluated(finds_the_needle, perplexity=True, tasks=("needle", "multi-key"))
    console = Console(width=200, file=StringIO())
    for table in tables(results):
        console.print(table)
    told = console.file.getvalue()
    assert "model can't do this task (0 of 100 with full attention): no verdict" in told
    assert "within noise; a loss of more than" in told
    assert "needle, 50% streaming" in told
    assert "perplexity by position" in told


class TestEngines:
    @pytest.fixture
    def workers(self, monkeypatch):
        """Stands in for the worker's process; its list has the name of each that ran."""
        ran = []

        def fake(name, job_file, answers, log):
            ran.append(name)
            answers.write_text(json.dumps({"asked": json.loads(job_file.read_text())}))

        monkeypatch.setattr(engines, "_run", fake)
        return ran

    def test_answers_are_kept(self, workers, tmp_path):
        for _ in range(2):
            found = engines.answers_of("full", {"engine": {}, "rounds": []}, tmp_path)
            assert found["asked"]["rounds"] == []
        assert workers == ["full"]

    def test_another_job_is_run(self, workers, tmp_path):
        engines.answers_of("full", {"engine": {}}, tmp_path)
        engines.answers_of("full", {"engine": {"dtype": "float32"}}, tmp_path)
        assert workers == ["full", "full"]

    def test_failure_keeps_the_log(self, tmp_path):
        with pytest.raises(
            RuntimeError, match=r"(?s)the engine 'full' ended with exit code 1.*KeyError"
        ):
            engines.answers_of("full", {"no": "engine"}, tmp_path)
        assert not list(tmp_path.glob("*.answers.json"))


class TestPerplexity:
    LENGTHS = (40, 44)

    def logprobs(self, late: float) -> list[list[float]]:
        return [[-1.0] * (n // 2) + [late] * (n // 2) for n in self.LENGTHS]

    def test_loss_shows_where_it_is(self):
        found = compare(self.logprobs(-1.0), self.logprobs(-1.5), vocabulary=1000)
        assert found["kind"] == "lost"
        assert [part["duo_nats"] for part in found["by_position"]] == [1.0, 1.0, 1.5, 1.5]
        assert found["loss_nats"] == pytest.approx(0.25)

    def test_none(self):
        assert compare(self.logprobs(-1.0), self.logprobs(-1.0), 1000)["kind"] == "within_noise"

    def test_model_that_guesses(self):
        found = compare(self.logprobs(-9.0), self.logprobs(-9.0), vocabulary=100)
        assert found["kind"] == "cannot_do"

    def test_other_texts(self):
        with pytest.raises(ValueError, match="expected the same texts of both"):
            compare([[-1.0]], [[-1.0, -1.0]], 10)
