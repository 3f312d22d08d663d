"""``vllm-duo identify``: flags arrive, errors are told in a sentence."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from tests.identify.conftest import *  # noqa: F403 - its fixtures
from vllm_duo.cli.identify import app
from vllm_duo.identify import run as run_module

FLAGS = ("--sink-size", "4", "--recent-size", "12", "--max-length", "96", "--min-length", "80")


@pytest.fixture
def call(monkeypatch):
    """Settings and keywords that the flags lead to, without a run."""
    seen = {}

    class Stop(Exception):
        pass

    def identify(model, settings, out, **more):
        seen.update(model=model, settings=settings, out=out, **more)
        raise Stop

    monkeypatch.setattr(run_module, "identify", identify)

    def run(*arguments):
        result = CliRunner().invoke(app, list(arguments))
        assert isinstance(result.exception, Stop), result.output
        return seen

    return run


def test_flags_become_settings(call, tmp_path):
    seen = call(
        *("m", "--out", str(tmp_path), "--method", "retrieval-score", "--needle-match", "anywhere"),
        *(
            "--gqa",
            "mean",
            "--samples",
            "7",
            "--seed",
            "2",
            "--dtype",
            "float32",
            "--device",
            "cpu",
        ),
        *("--keys", "3", "--resume", "--ray", "local", *FLAGS),
    )
    settings = seen["settings"]
    assert (settings.method, settings.needle_match, settings.gqa) == (
        "retrieval-score",
        "anywhere",
        "mean",
    )
    assert (settings.samples, settings.seed, settings.keys) == (7, 2, 3)
    assert (settings.sink_size, settings.recent_size, settings.max_length) == (4, 12, 96)
    assert (seen["model"], seen["out"], seen["resume"], seen["ray"]) == (
        "m",
        tmp_path,
        True,
        "local",
    )


def test_defaults_are_those_of_the_settings(call, tmp_path):
    from vllm_duo.identify.settings import IdentifySettings

    assert call("m", "--out", str(tmp_path))["settings"] == IdentifySettings()


def test_every_setting_has_a_flag():
    from inspect import signature

    from vllm_duo.cli.identify import identify
    from vllm_duo.identify.settings import IdentifySettings

    assert set(IdentifySettings.model_fields) <= set(signature(identify).parameters)


def test_run_tells_verdict_and_effort(model_folder, tmp_path):
    arguments = [
        str(model_folder),
        "--out",
        str(tmp_path / "out"),
        "--method",
        "on-the-fly",
        *FLAGS,
    ]
    result = CliRunner().invoke(app, [*arguments, "--samples", "3", "--check-samples", "2"])
    assert result.exit_code == 0, result.output
    assert "3 steps or samples" in result.output
    assert "cannot be judged" in result.output  # a random model answers nothing
    assert (tmp_path / "out" / "full_attention_heads.tsv").exists()


@pytest.mark.parametrize(
    ("steps", "message"), [(1, "before the first"), (3, "go on with --resume")]
)
def test_ctrl_c_says_how_to_go_on(model_folder, tmp_path, monkeypatch, steps, message):
    from vllm_duo.identify import gates

    real = gates.gate_step

    def step(job, state, *more):
        if state.done == steps:
            raise KeyboardInterrupt
        return real(job, state, *more)

    monkeypatch.setattr(gates, "gate_step", step)
    arguments = [
        str(model_folder),
        "--out",
        str(tmp_path / "out"),
        *FLAGS,
        "--checkpoint-every",
        "2",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 130
    assert message in " ".join(result.output.split())
