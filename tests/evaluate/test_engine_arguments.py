"""vLLM takes what an evaluation gives to its engines: checked on the config, without an engine."""

from __future__ import annotations

import os

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.e2e.needle import MODEL
from vllm_duo import plugin
from vllm_duo.evaluate.run import engine_arguments
from vllm_duo.evaluate.settings import EvalSettings


@pytest.fixture(autouse=True)
def this_process(monkeypatch):
    """Models are looked at here instead of in a process of 20 s; settings of it come back."""
    before = dict(os.environ)
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())
    plugin.register()
    yield
    os.environ.clear()
    os.environ.update(before)


def config_of(sparsity):
    settings = EvalSettings(
        model=str(MODEL),
        tasks=("needle",),
        sink_size=8,
        seed=3,
        engine={"dtype": "float32", "enforce_eager": True},
    )
    arguments = engine_arguments(settings, sparsity, 600)
    return EngineArgs(**arguments).create_engine_config()


def test_duo():
    config = config_of(0.25)
    assert config.attention_config.backend is AttentionBackendEnum["DUO"]
    assert config.additional_config == {"duo": {"sparsity": 0.25, "sink_size": 8}}
    assert config.model_config.max_model_len >= 600
    assert config.cache_config.enable_prefix_caching
    assert config.model_config.seed == 3


def test_stock():
    config = config_of(None)
    assert config.attention_config.backend is not AttentionBackendEnum["DUO"]
    assert not config.additional_config
    assert config.model_config.enforce_eager
