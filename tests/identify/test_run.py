"""Whole runs: what they write, how they resume, what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.identify import tiny
from tests.identify.conftest import make_job, tiny_settings
from vllm_duo import HeadPattern
from vllm_duo.identify import memory
from vllm_duo.identify import run as run_module
from vllm_duo.identify.checkpoint import CHECKPOINT_NAME
from vllm_duo.identify.registry import FORWARD_METHODS
from vllm_duo.identify.run import count_units, identify
from vllm_duo.identify.samples import SampleMaker
from vllm_duo.server_plan import make_plan

RUNS = {
    "gates": {"steps": 7, "batch_size": 2, "checkpoint_every": 3},
    "retrieval-score": {"samples": 5, "checkpoint_every": 2},
    "induction": {"samples": 5, "checkpoint_every": 2},
    "on-the-fly": {"samples": 5, "checkpoint_every": 2},
}


class Killed(BaseException):
    pass


def kill_after(steps):
    def progress(done, total, note):
        if done >= steps and not note.startswith("self-check"):
            raise Killed

    return progress


@pytest.fixture(scope="module")
def uninterrupted(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    made = {}

    def get(method):
        if method not in made:
            settings = tiny_settings(method=method, **RUNS[method])
            made[method] = identify(str(model_folder), settings, folder / method)
        return made[method]

    return get


@pytest.mark.parametrize("method", sorted(RUNS))
def test_run_writes_a_pattern_that_loads(uninterrupted, method):
    outcome = uninterrupted(method)
    files = {path.name for path in outcome.folder.iterdir()}
    assert {"full_attention_heads.tsv", "config.json", "heatmap.png", "REPORT.md"} <= files
    assert CHECKPOINT_NAME not in files
    pattern = HeadPattern.load(outcome.folder)
    np.testing.assert_array_equal(pattern.values, outcome.pattern.values)
    config = pattern.metadata
    assert config["method"] == method
    assert (config["deploy_sink_size"], config["deploy_recent_size"]) == (tiny.SINK, tiny.RECENT)
    assert config["mask_hashes"]["0.5"] == pattern.select(sparsity=0.5).mask_hash
    assert config["settings"]["max_length"] == 96
    assert len(config["model"]["fingerprint"]) == 16
    assert config["versions"]["torch"]
    assert config["measured"]["peak_memory_bytes"] > 0
    assert (outcome.folder / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    for name in ("retrieval_score", "echo_score", "induction_score", "output_change"):
        if f"{name}.tsv" in files:
            assert np.loadtxt(outcome.folder / f"{name}.tsv").shape == (2, 4)


@pytest.mark.parametrize(
    ("method", "killed_after"),
    [
        *(("gates", 1), ("gates", 3), ("gates", 5)),  # before, at and after a checkpoint
        *(("retrieval-score", 3), ("induction", 5), ("on-the-fly", 2)),
    ],
)
def test_resumed_run_gives_the_same_result(
    model_folder, uninterrupted, tmp_path, method, killed_after
):
    settings = tiny_settings(method=method, **RUNS[method])
    with pytest.raises(Killed):
        identify(str(model_folder), settings, tmp_path / "out", progress=kill_after(killed_after))
    assert not (tmp_path / "out" / "full_attention_heads.tsv").exists()
    seen = []
    outcome = identify(
        str(model_folder),
        settings,
        tmp_path / "out",
        resume=True,
        progress=lambda done, total, note: seen.append(done),
    )
    every, total = RUNS[method]["checkpoint_every"], count_units(settings)
    if killed_after < total:
        assert seen[0] == killed_after // every * every + 1  # went on, and did not start again
    whole = uninterrupted(method)
    table = "full_attention_heads.tsv"
    assert (outcome.folder / table).read_bytes() == (whole.folder / table).read_bytes()
    assert outcome.check == whole.check


def test_kill_in_the_self_check_resumes_at_the_end(model_folder, uninterrupted, tmp_path):
    settings = tiny_settings(method="on-the-fly", **RUNS["on-the-fly"])

    def progress(done, total, note):
        if note.startswith("self-check"):
            raise Killed

    with pytest.raises(Killed):
        identify(str(model_folder), settings, tmp_path, progress=progress)
    outcome = identify(str(model_folder), settings, tmp_path, resume=True)
    np.testing.assert_array_equal(
        outcome.pattern.values, uninterrupted("on-the-fly").pattern.values
    )


def test_seed_changes_the_result(model_folder, uninterrupted, tmp_path):
    settings = tiny_settings(method="on-the-fly", seed=1, **RUNS["on-the-fly"])
    other = identify(str(model_folder), settings, tmp_path)
    assert not np.array_equal(other.pattern.values, uninterrupted("on-the-fly").pattern.values)


def test_exclusive_runs_from_another_pattern(model_folder, uninterrupted, tmp_path):
    source = uninterrupted("on-the-fly").folder
    outcome = identify(
        str(model_folder), tiny_settings(method="exclusive", source=source), tmp_path
    )
    assert (outcome.pattern.values[:, :1] == outcome.pattern.values).all()
    assert outcome.pattern.metadata["details"]["source_method"] == "on-the-fly"
    assert "No layer holds both classes" in (tmp_path / "REPORT.md").read_text()


def test_exclusive_refuses_another_models_pattern(model_folder, tmp_path):
    HeadPattern.uniform(3, 2).save(tmp_path / "other")
    settings = tiny_settings(method="exclusive", source=tmp_path / "other")
    with pytest.raises(ValueError, match="3 layers, the model has 2"):
        identify(str(model_folder), settings, tmp_path / "out")


def test_checkpoint_of_another_run_is_refused(model_folder, tmp_path):
    settings = tiny_settings(method="on-the-fly", **RUNS["on-the-fly"])
    with pytest.raises(Killed):
        identify(str(model_folder), settings, tmp_path, progress=kill_after(3))
    for other in ({"seed": 1}, {"sink_size": 5}):
        changed = settings.model_copy(update=other)
        with pytest.raises(ValueError, match="another model, method or setting"):
            identify(str(model_folder), changed, tmp_path, resume=True)


def test_another_models_checkpoint_is_refused(model_folder, tmp_path):
    settings = tiny_settings(method="on-the-fly", **RUNS["on-the-fly"])
    with pytest.raises(Killed):
        identify(str(model_folder), settings, tmp_path / "out", progress=kill_after(3))
    other = tiny.save(tiny.random_llama(seed=1), tmp_path / "other")
    with pytest.raises(ValueError, match="another model"):
        identify(str(other), settings, tmp_path / "out", resume=True)


def test_self_check_settings_may_change_on_resume(model_folder, tmp_path):
    settings = tiny_settings(method="on-the-fly", **RUNS["on-the-fly"])
    with pytest.raises(Killed):
        identify(str(model_folder), settings, tmp_path, progress=kill_after(3))
    changed = settings.model_copy(update={"check_samples": 0})
    assert identify(str(model_folder), changed, tmp_path, resume=True).check is None
    assert "Not checked" in (tmp_path / "REPORT.md").read_text()


@pytest.mark.parametrize(
    ("content", "resume", "message"),
    [
        ("full_attention_heads.tsv", False, "finished"),
        ("full_attention_heads.tsv", True, "finished"),
        (CHECKPOINT_NAME, False, "--resume"),
    ],
)
def test_nothing_is_written_over(tmp_path, content, resume, message):
    (tmp_path / content).write_text("0.5\n")
    with pytest.raises(ValueError, match=message):
        identify("no model is loaded", tiny_settings(), tmp_path, resume=resume)


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="found a file"):
        identify("no model is loaded", tiny_settings(), tmp_path / "file")


def test_ray_is_for_forward_only_methods(tmp_path):
    with pytest.raises(ValueError, match="only run forward"):
        identify("no model is loaded", tiny_settings(), tmp_path, ray="local")


def test_missing_matplotlib_is_told_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_duo.identify.results.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"vllm-duo\[identify\]"):
        identify("no model is loaded", tiny_settings(), tmp_path)


def test_text_that_is_too_short_is_found_before_the_run(model_folder, tmp_path):
    (tmp_path / "text").write_text("Anna went to the market.")
    with pytest.raises(ValueError, match="at least 96 tokens"):
        identify(str(model_folder), tiny_settings(text=tmp_path / "text"), tmp_path / "out")


TRIED = r"up to 700 tokens; 175 was tried and fits: use --max-length 175( and.*)? and start again$"


@pytest.mark.parametrize("min_length", [650, None])
@pytest.mark.parametrize("method", ["gates", "on-the-fly"])
def test_out_of_memory_names_a_length_that_fits(
    model_folder, tmp_path, monkeypatch, method, min_length
):
    limit = 200
    real_step, real_method = run_module.gate_step, FORWARD_METHODS["on-the-fly"]

    def step(job, state, ids, *more):
        if ids.shape[1] > limit:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real_step(job, state, ids, *more)

    class Method(type(real_method)):
        def score(self, job, index):
            if job.lengths()[1] > limit:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return super().score(job, index)

    monkeypatch.setattr("vllm_duo.identify.run.gate_step", step)
    monkeypatch.setattr("vllm_duo.identify.gates.gate_step", step)
    monkeypatch.setitem(FORWARD_METHODS, "on-the-fly", Method())
    settings = tiny_settings(method=method, max_length=700, min_length=min_length)
    with pytest.raises(MemoryError, match=TRIED) as error:
        identify(str(model_folder), settings, tmp_path)
    assert ("--min-length at most 175" in str(error.value)) == (min_length is not None)


@pytest.mark.parametrize(("method", "least"), [("on-the-fly", 49), ("induction", 4 * 17 + 1)])
def test_no_length_is_tried_that_the_method_refuses(method, least):
    job = make_job(tiny.random_llama(), method=method, max_length=700, min_length=650)
    tried = []

    def trial(length):
        tried.append(length)
        raise MemoryError

    error = memory.explain_out_of_memory(job, 650, trial)
    assert tried == [350, 175, 87, least]
    assert "up to 700 tokens, and with shorter ones too: use a larger device" in str(error)
    tried.clear()
    short = make_job(tiny.random_llama(), method=method, max_length=least, min_length=None)
    error = memory.explain_out_of_memory(short, None, trial)
    assert tried == []
    assert f"up to {least} tokens: use a larger device" in str(error)


@pytest.mark.parametrize("method", ["on-the-fly", "induction"])
def test_the_least_length_is_the_least_that_runs(method):
    job = make_job(tiny.random_llama(), method=method, min_length=None)
    run_module.one_step(job, job.least_length)
    if method == "induction":
        with pytest.raises(ValueError, match=f"of at least {job.least_length}$"):
            run_module.one_step(job, job.least_length - 1)


@pytest.mark.parametrize(
    ("method", "told"), [("exclusive", "no result"), ("on-the-fly", "the run")]
)
def test_out_of_memory_as_results_are_written(model_folder, tmp_path, monkeypatch, method, told):
    def fail(*arguments):
        raise MemoryError

    source = None
    if method == "exclusive":
        source = tmp_path / "source"
        HeadPattern(np.array([[0.9, 0.1], [0.2, 0.3]])).save(source)
    settings = tiny_settings(method=method, source=source, samples=2, check_samples=0)
    monkeypatch.setattr(run_module, "write_results", fail)
    with pytest.raises(
        MemoryError, match=f"out of memory as the results were written; {told}"
    ) as e:
        identify(str(model_folder), settings, tmp_path / "out")
    kept = (tmp_path / "out" / CHECKPOINT_NAME).exists()
    assert kept == (method != "exclusive")
    assert ("checkpoint is kept: run the same command with --resume" in str(e.value)) == kept
    assert "self-check" not in str(e.value)


@pytest.mark.parametrize(
    ("left", "batch_size", "remedy"),
    [
        (600_000, 1, r"--max-length (\d+) or less and --min-length at most \1$"),
        (600_000, 2, r"a smaller --batch-size$"),  # a length that fits would be too short
        (
            1_200_000,
            2,
            r"--max-length (\d+) or less and --min-length at most \1, or a smaller --batch-size$",
        ),
        (300_000, 1, r"a machine with more memory, or --dtype bfloat16$"),
    ],
)
def test_run_that_is_estimated_not_to_fit_is_refused(
    model_folder, tmp_path, monkeypatch, left, batch_size, remedy
):
    monkeypatch.setattr("vllm_duo.identify.memory.available_bytes", lambda device: left)
    settings = tiny_settings(batch_size=batch_size)
    with pytest.raises(MemoryError, match=rf"left: use {remedy}") as error:
        identify(str(model_folder), settings, tmp_path)
    if "--max-length" in remedy:
        fits = int(str(error.value).split("--max-length ")[1].split()[0])
        assert tiny.SINK + tiny.RECENT + 32 < fits < 96


def test_full_disk_at_the_end_keeps_the_checkpoint(model_folder, tmp_path, monkeypatch):
    import errno

    def full(file, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    settings = tiny_settings(method="on-the-fly", **RUNS["on-the-fly"])
    monkeypatch.setattr("vllm_duo.identify.results.write_atomically", full)
    with pytest.raises(OSError, match="is full"):
        identify(str(model_folder), settings, tmp_path)
    monkeypatch.undo()
    assert (tmp_path / CHECKPOINT_NAME).exists()
    identify(str(model_folder), settings, tmp_path, resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["method"] == "on-the-fly"


class TestSlidingWindows:
    """Of the model's own: a pattern chooses in the other layers, as the server does."""

    @pytest.fixture(scope="class", params=[tiny.sliding_gemma, tiny.sliding_gpt_oss])
    def slides(self, request, tmp_path_factory):
        """Layers 0 and 2 of three slide over 40 tokens, more than a streaming head keeps."""
        return tiny.save(request.param(40), tmp_path_factory.mktemp("slides"))

    @pytest.mark.parametrize("method", sorted(RUNS))
    def test_the_pattern_chooses_in_the_other_layers(self, slides, tmp_path, method):
        settings = tiny_settings(
            method=method, **RUNS[method], **({"max_length": 200} if method == "induction" else {})
        )
        outcome = identify(str(slides), settings, tmp_path / "out")
        values = outcome.pattern.values
        assert values.shape == (3, 2)
        assert (values[[0, 2]] == 0.0).all()
        if method != "retrieval-score":  # it counts keys that a random model does not find
            assert values[1].any()
        # The server's own choice, of the written folder.
        plan = make_plan(
            {"duo": {"pattern": str(tmp_path / "out")}}, str(slides), 3, 2, windows=(40, None, 40)
        )
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["mask_hashes"]["0.5"] == plan.resolved.selection.mask_hash
        assert plan.resolved.selection.retrieval.sum(1).tolist() == [0, 1, 0]
        assert config["model"]["windows"] == [40, None, 40]
        report = (tmp_path / "out" / "REPORT.md").read_text()
        assert "2 of 3 layers slide over 40 tokens of the model's own" in report
        assert "| 0.5 | 1 of 6 |" in report

    def test_exclusive_leaves_them_out(self, slides, tmp_path):
        HeadPattern(np.array([[0.9, 0.9], [0.2, 0.1], [0.8, 0.7]])).save(tmp_path / "source")
        settings = tiny_settings(method="exclusive", source=tmp_path / "source", check_samples=0)
        outcome = identify(str(slides), settings, tmp_path / "out")
        np.testing.assert_array_equal(outcome.pattern.values, [[0, 0], [1, 1], [0, 0]])

    def test_samples_within_the_window_are_refused(self, slides, tmp_path):
        settings = tiny_settings(method="on-the-fly", min_length=60, max_length=72)
        with pytest.raises(ValueError, match="layers of the model's own slide over 40 and shorter"):
            identify(str(slides), settings, tmp_path)

    def test_checked_keys_lie_outside_the_window(self, slides, tmp_path, monkeypatch):
        asked = []
        real = SampleMaker.make_hidden
        monkeypatch.setattr(
            SampleMaker, "make_hidden", lambda self, *what: asked.append(what) or real(self, *what)
        )
        settings = tiny_settings(method="on-the-fly", **RUNS["on-the-fly"])
        identify(str(slides), settings, tmp_path / "out")
        assert [what[2:] for what in asked] == [(tiny.SINK, 40)]
