"""vLLM's choice of a model runner with duo: V1 by itself, V2 only where it is tried."""

from __future__ import annotations

import pytest
import vllm.config.vllm

from tests.server.configs import reasons_of


@pytest.fixture(autouse=True)
def told(monkeypatch):
    """What vLLM logs of its choice, once; as where Triton has a device to run on."""
    monkeypatch.setattr(vllm.config.vllm, "HAS_TRITON", True)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    found: list[str] = []

    def warning_once(message, *values):
        if (text := message % values) not in found:
            found.append(text)

    monkeypatch.setattr(vllm.config.vllm.logger, "warning_once", warning_once)
    return found


def test_is_v1_without_a_setting_and_vllm_says_why(serve, told):
    assert serve().use_v2_model_runner is False
    assert [line for line in told if "Runner" in line] == [
        "Model Runner V2 does not yet support the attention backend duo; using the V1 model runner "
        "instead."
    ]


def test_is_still_refused_where_v2_is_asked_for(serve, told, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    (reason,) = reasons_of(serve)
    assert reason == ("vLLM's model runner V2: not tested yet, set VLLM_USE_V2_MODEL_RUNNER=0")


def test_v2_may_be_tried(serve, told, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    config = serve(duo={"untested_model_runner": True})
    assert config.use_v2_model_runner is True


def test_trying_v2_takes_the_variable_too(serve, told):
    assert serve(duo={"untested_model_runner": True}).use_v2_model_runner is False


def test_is_v1_where_v1_is_asked_for(serve, told, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert serve().use_v2_model_runner is False
    assert [line for line in told if "Runner" in line] == []


def test_of_other_backends_is_vllms(serve, told):
    assert serve(table=None, attention_backend=None).use_v2_model_runner is True
    assert [line for line in told if "Runner" in line] == []
