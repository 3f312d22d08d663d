"""The self-test passes here, and finds each operator when it is damaged."""

from __future__ import annotations

import pytest
import torch

from vllm_duo.doctor import self_test as module
from vllm_duo.doctor.self_test import Result, self_test


def test_operators_pass():
    results = self_test()
    assert {result.name for result in results} >= {
        "head size 64, float32",
        "head size 128, bfloat16",
        "head size 64, float32, retrieval heads int8_per_token_head",
    }
    assert all(result.passed for result in results), results
    assert all(result.error > 0 for result in results)


@pytest.fixture
def one_dtype(monkeypatch):
    monkeypatch.setattr(module, "DTYPES", (torch.float32,))


@pytest.mark.parametrize(
    "name", ["decode", "prefill", "write_retrieval", "write_streaming", "copy_snapshots"]
)
def test_missing_operator_is_found(monkeypatch, one_dtype, name):
    monkeypatch.setattr(module, name, lambda *arguments: None)
    assert not any(result.passed for result in self_test())


def test_a_key_too_many_is_found(monkeypatch, one_dtype):
    monkeypatch.setattr(module, "RECENT_SIZE", module.RECENT_SIZE + 1)
    served = module._Served.__init__

    def one_less(self, *arguments):
        monkeypatch.setattr(module, "RECENT_SIZE", 40)
        served(self, *arguments)
        monkeypatch.setattr(module, "RECENT_SIZE", 41)

    monkeypatch.setattr(module._Served, "__init__", one_less)
    assert not any(result.passed for result in self_test())


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_noise_is_found(monkeypatch, one_dtype, name):
    right = getattr(module, name)

    def noisy(*arguments):
        right(*arguments)
        arguments[-1].add_(1e-4)

    monkeypatch.setattr(module, name, noisy)
    assert not any(result.passed for result in self_test())


def test_nan_does_not_pass():
    assert not Result(name="", error=float("nan"), bound=1.0).passed
