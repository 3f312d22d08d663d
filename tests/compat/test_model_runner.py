"""vLLM's own choice of a model runner comes out as V1 for duo."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_duo.compat import model_runner
from vllm_duo.plugin import register


@pytest.fixture
def config():
    """Makes a patched config of vLLM's kind."""
    register()

    class VllmConfig:
        def __init__(self, backend, *features):
            self.attention_config = SimpleNamespace(backend=backend)
            self.features = list(features)

        def _get_v2_model_runner_unsupported_features(self):
            return self.features

    module = SimpleNamespace(VllmConfig=VllmConfig, envs=SimpleNamespace())
    module.envs.VLLM_USE_V2_MODEL_RUNNER = None
    model_runner.patch(module)
    VllmConfig.envs = module.envs
    return VllmConfig


def unsupported(config) -> list[str]:
    return config._get_v2_model_runner_unsupported_features()


def test_duo_is_one_of_what_v2_lacks(config):
    found = config(AttentionBackendEnum.CUSTOM, "something")
    assert unsupported(found) == ["something", "the attention backend duo"]
    assert found.features == ["something"]


@pytest.mark.parametrize("asked", [True, False])
def test_a_runner_that_was_asked_for_is_not_spoken_of(config, asked):
    config.envs.VLLM_USE_V2_MODEL_RUNNER = asked
    assert unsupported(config(AttentionBackendEnum.CUSTOM)) == []


@pytest.mark.parametrize("backend", [None, AttentionBackendEnum.FLASH_ATTN])
def test_other_backends_keep_what_vllm_says(config, backend):
    assert unsupported(config(backend)) == []
    assert unsupported(config(backend, "something")) == ["something"]


def test_another_plugins_custom_backend_is_left_alone(config, monkeypatch):
    monkeypatch.setattr(AttentionBackendEnum, "get_path", lambda self: "another.Backend")
    assert unsupported(config(AttentionBackendEnum.CUSTOM)) == []
