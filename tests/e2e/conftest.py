"""Engines in this process: five seconds each instead of a server's minute."""

from __future__ import annotations

import os

# vLLM reads these when it is imported.
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING",
)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest

from tests.models.random_models import make_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Makes each random checkpoint once."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(shape):
        if shape not in made:
            made[shape] = make_model(shape, folder)
        return made[shape]

    return get


@pytest.fixture(scope="session")
def half_server(tmp_path_factory):
    """One server for many tests: the needle model with its own pattern, half its heads streaming."""
    from tests.e2e.needle import serve

    with serve(tmp_path_factory.mktemp("server") / "log", "--attention-backend", "duo") as server:
        server.wait_until_ready()
        yield server
