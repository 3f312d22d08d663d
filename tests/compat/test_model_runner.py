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

    model_runner.patch(SimpleNamespace(VllmConfig=VllmConfig))
    return VllmConfig


def unsupported(config) -> list[str]:
    return config._get_v2_model_runner_unsupported_features()


def test_duo_is_one_of_what_v2_lacks(config):
    found = config(AttentionBackendEnum.CUSTOM, "something")
    assert unsupported(found) == ["something", "the attention backend duo"]
    assert found.features == ["something"]


@pytest.mark.parametrize("backend", [None, AttentionBackendEnum.FLASH_ATTN])
def test_other_backends_keep_what_vllm_says(config, backend):
    assert unsupported(config(backend)) == []
    assert unsupported(config(backend, "something")) == ["something"]


def test_another_plugins_custom_backend_is_left_alone(config, monkeypatch):
    monkeypatch.setattr(AttentionBackendEnum, "get_path", lambda self: "another.Backend")
    assert unsupported(config(AttentionBackendEnum.CUSTOM)) == []
