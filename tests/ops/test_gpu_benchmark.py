"""The GPU benchmark's part that needs no GPU: its refusal, its cases, its arithmetic."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import attention_cuda
from benchmarks.attention_cuda import Case, cases


@pytest.fixture
def implementation():
    return "none"


def test_without_a_gpu_it_says_so_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["attention_cuda"])
    assert attention_cuda.main() == 2
    said = capsys.readouterr().out
    assert said.startswith("benchmarks.attention_cuda needs an NVIDIA GPU")
    assert said.endswith("nothing was measured\n")
    assert said.count("\n") == 1


def test_cases_cover_the_contexts_batches_and_chunks():
    every = list(cases(smoke=False))
    assert {case.context + case.chunk for case in every} >= {1024, 131072, 1048576}
    assert {case.requests for case in every if case.chunk == 1} == {1, 4, 16, 64}
    assert {case.chunk for case in every} == {1, 2048, 8192}
    assert {case.sparsity for case in every} == {0.0, 0.25, 0.5, 0.75, 1.0}


def test_needed_bytes_count_each_key_once():
    # 4 retrieval heads of 1,000 keys and 4 streaming heads of 320, 2 requests, 512 bytes a key.
    assert Case("Llama-3-8B", 999, 1, 2, 0.5).needed_bytes == 2 * 4 * (1000 + 320) * 512
    # Nothing is left out of a short context.
    assert Case("Llama-3-8B", 99, 1, 1, 1.0).needed_bytes == 8 * 100 * 512
