"""The Triton kernels compile for NVIDIA GPUs, as their public functions launch them; needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SHARED_BYTES = {80: 166912, 89: 101376, 90: 232448, 100: 232448}
"""Shared memory of a program at most (CUDA programming guide, compute capabilities)."""


@pytest.fixture(autouse=True)
def implementation():
    return "triton"


def compiled(cases, cache):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-m", "tests.ops.triton_compile", json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_fits(kernels, cases):
    names = [kernel["kernel"] for kernel in kernels]
    each = ["_write_kv", "_copy_snapshots", "_decode", "_merge", "_prefill"]
    assert names == each * len(cases)
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_BYTES[kernel["arch"]], kernel
        assert kernel["local_bytes"] == 0, kernel


@pytest.mark.slow
def test_triton_kernels_compile_for_hopper(tmp_path):
    cases = [(90, "bfloat16", 128, 4, 1)]
    assert_fits(compiled(cases, tmp_path), cases)


@pytest.mark.slow
def test_triton_kernels_compile_for_every_architecture(tmp_path):
    cases = [
        (arch, dtype, head_size, group, query)
        for arch in SHARED_BYTES
        for dtype, head_size, group, query in (
            ("bfloat16", 64, 1, 1),
            ("float16", 96, 7, 4),
            ("bfloat16", 128, 8, 8),
            ("bfloat16", 256, 4, 1),
            ("float32", 128, 4, 1),
        )
    ]
    assert_fits(compiled(cases, tmp_path), cases)
