"""Settings: files, flags, and what is impossible."""

from __future__ import annotations

import json

import pytest

from tests.identify import tiny
from tests.identify.conftest import make_job, tiny_settings
from vllm_duo.identify.methods import complete
from vllm_duo.identify.settings import make_settings


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"method": "induction", "seed": 3, "samples": 9}))
    settings = make_settings({"seed": 4, "method": None}, file)
    assert (settings.method, settings.seed, settings.samples) == ("induction", 4, 9)


def test_toml_and_a_finished_patterns_config_are_read(tmp_path):
    (tmp_path / "a.toml").write_text('method = "on-the-fly"\nseed = 2\n')
    assert make_settings({}, tmp_path / "a.toml").seed == 2
    (tmp_path / "config.json").write_text(json.dumps({"model_name": "x", "settings": {"seed": 5}}))
    assert make_settings({}, tmp_path / "config.json").seed == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stesp": 3}, r"stesp: unknown setting \(did you mean steps\?\)"),
        ({"steps": 0, "recent_size": 0}, r"recent_size: .*; steps: .*"),
        ({"method": "magic"}, "'gates', 'retrieval-score'"),
        ({"method": "exclusive"}, "--from DIR"),
        ({"method": "gates", "source": "x"}, "is for method exclusive"),
        ({"min_length": 100, "max_length": 50}, "above max_length"),
    ],
)
def test_bad_settings_are_all_named(values, message):
    with pytest.raises(ValueError, match=message):
        make_settings(values)


@pytest.mark.parametrize("text", ["[1]", "not json", None])
def test_bad_file_is_named(tmp_path, text):
    file = tmp_path / "settings.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=r"settings\.json: expected"):
        make_settings({}, file)


def test_lengths_default_to_the_model():
    job = make_job(tiny.random_llama(max_length=None), max_length=None, min_length=None)
    assert job.lengths() == (128, 1024)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_length": 2000}, "at most the model's 1024 positions"),
        ({"max_length": 40, "min_length": None}, "more than 48 tokens"),
        ({"check_length": 40}, "--check-length 40"),
    ],
)
def test_lengths_that_cannot_be_are_refused(more, message):
    model = make_job(tiny.random_llama()).model
    with pytest.raises(ValueError, match=message):
        complete(tiny_settings(**more), model)
