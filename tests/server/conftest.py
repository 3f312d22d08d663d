"""Servers that are configured and not started: vLLM's EngineArgs makes the whole config."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import vllm.platforms
from vllm.engine.arg_utils import EngineArgs

from tests.messages import messages_of
from tests.server.configs import LLAMA, PATTERN
from tests.this_process import this_process  # noqa: F401 - a fixture
from vllm_duo.compat import cpu_platform


@pytest.fixture
def serve(tmp_path):
    """Makes vLLM's config of a model folder, as the front end of a server does."""

    def serve(config=LLAMA, table: str | None = PATTERN, duo=None, **settings):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if table is not None:
            (tmp_path / "duo_pattern").mkdir()
            (tmp_path / "duo_pattern" / "full_attention_heads.tsv").write_text(table)
        defaults = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "attention_backend": "duo",
            "additional_config": {} if duo is None else {"duo": duo},
        }
        return EngineArgs(model=str(tmp_path), **(defaults | settings)).create_engine_config()

    return serve


@pytest.fixture
def messages(monkeypatch):
    """(level, text) of what the plugin logs as it checks a config."""
    return messages_of(cpu_platform, monkeypatch)


# This vLLM knows one platform only, so other ones are stand-ins.
@pytest.fixture
def platform(monkeypatch):
    def choose(name):
        platform = SimpleNamespace(
            device_name=name, is_cpu=lambda: False, is_cuda=lambda: name == "cuda"
        )
        monkeypatch.setattr(vllm.platforms, "current_platform", platform, raising=False)

    return choose
