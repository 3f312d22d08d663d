"""The Triton kernels compile for NVIDIA GPUs, as their public functions launch them; needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SHARED_BYTES = {80: 166912, 89: 101376, 90: 232448, 100: 232448}
"""Shared memory of a program at most (CUDA programming guide, compute capabilities)."""


PREFILL_STACK_BYTES = 80
"""Of a thread, at most: 20 registers (docs/gpu.md)."""


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
    expected = [n for case in cases for n in each if case[5] != "retrieval" or "snap" not in n]
    assert names == expected
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_BYTES[kernel["arch"]], kernel


@pytest.mark.slow
def test_triton_kernels_compile_for_hopper(tmp_path):
    cases = [(90, "bfloat16", 128, 4, 1, "both"), (90, "bfloat16", 64, 8, 1, "both", True)]
    kernels = compiled(cases, tmp_path)
    assert_fits(kernels, cases)
    for of_case in (kernels[:5], kernels[5:]):
        *others, prefill = [kernel["stack_bytes"] for kernel in of_case]
        assert others == [0] * 4
        assert prefill <= PREFILL_STACK_BYTES


@pytest.mark.slow
def test_triton_kernels_load_a_tile_while_another_is_computed(tmp_path):
    """Of every loop over keys at least a tile's keys and values stay on their way at its wait."""
    cases = [
        (arch, dtype, head_size, 4, 1, "both")
        for arch in SHARED_BYTES
        for dtype, head_size in (("bfloat16", 128), ("float16", 64))
    ]
    kernels = [k for k in compiled(cases, tmp_path) if k["kernel"] in ("_decode", "_prefill")]
    for kernel in kernels:
        # Slots of either class; in a prefill the chunk too, and a streaming head's own sink.
        assert len(kernel["copies_in_flight"]) == (2 if kernel["kernel"] == "_decode" else 5)
        assert min(kernel["copies_in_flight"]) >= 2, kernel


@pytest.mark.slow
def test_triton_kernels_compile_for_every_architecture(tmp_path):
    cases = [
        (arch, *shape)
        for arch in SHARED_BYTES
        for shape in (
            ("bfloat16", 64, 1, 1, "streaming"),
            ("float16", 96, 7, 4, "retrieval"),
            ("bfloat16", 128, 8, 8, "both"),
            ("bfloat16", 256, 4, 1, "both"),
            ("float32", 128, 4, 1, "both"),
        )
    ]
    assert_fits(compiled(cases, tmp_path), cases)
