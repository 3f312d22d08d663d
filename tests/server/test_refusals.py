"""What a server with a model or settings that are not supported answers, before any weights load."""

from __future__ import annotations

import pytest

from tests.server.configs import FALCON, LLAMA, reasons_of
from tests.server.refused import ALIBI, REFUSED_MODELS, REFUSED_SETTINGS, refused
from vllm_duo.model_facts import ModelFacts, model_refusals
from vllm_duo.windows import layer_windows


def facts_with(windows) -> ModelFacts:
    return ModelFacts(name="model", num_layers=2, num_kv_heads=2, head_size=16, windows=windows)


@pytest.mark.parametrize("model", refused(REFUSED_MODELS))
def test_model(serve, model):
    config, *reasons = model
    assert reasons_of(serve, config) == reasons


@pytest.mark.parametrize("setting", refused(REFUSED_SETTINGS))
def test_setting(serve, setting):
    reason, settings = setting
    assert reasons_of(serve, **settings) == [reason]


@pytest.mark.refused("KV heads that the ranks do not divide")
def test_heads_that_cannot_be_split(serve):
    shape = {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 6}
    (reason,) = reasons_of(serve, LLAMA | shape, tensor_parallel_size=4)
    assert reason.startswith(
        "--tensor-parallel-size 4: 6 KV heads cannot be split over 4 ranks: expected that one "
    )


@pytest.mark.refused("model runner V2")
def test_model_runner_v2(serve, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    (reason,) = reasons_of(serve)
    assert reason.endswith("not tested yet, set VLLM_USE_V2_MODEL_RUNNER=0")


def test_every_reason_is_told_at_once(serve):
    reasons = reasons_of(serve, FALCON, pipeline_parallel_size=2, kv_cache_dtype="nvfp4")
    assert [reason.split(":")[0] for reason in reasons] == [
        "ALiBi position biases",
        "--pipeline-parallel-size 2",
        "--kv-cache-dtype nvfp4",
    ]


def test_they_come_before_a_missing_pattern(serve):
    assert reasons_of(serve, FALCON, table=None) == [ALIBI]


@pytest.mark.refused("sliding windows of several sizes")
@pytest.mark.parametrize("window", [[32, 64], [32]])
def test_windows_of_several_sizes(window):
    (reason,) = model_refusals(facts_with(layer_windows(2, window, None)))
    assert reason == ("the model's own sliding windows: their sizes are not known for every layer")
