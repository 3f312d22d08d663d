from __future__ import annotations

import itertools

import pytest

from benchmarks.gpu import main
from tests.benchmarks.gpu.toys import CPU, LIMITS, PLAIN


@pytest.fixture
def machine():
    """Makes a stand-in for a GPU: a clock that gives each contender its own time."""
    # Not at the top: modules that compute import the kernels by way of tests/ops/triton_cases.py.
    from vllm_duo.ops.layer.triton import attend_and_write

    def make(**settings):
        made = itertools.count(1)

        def capture(steps):
            number = next(made)
            return lambda repeats: float(number * len(steps))

        defaults = {
            "device": CPU,
            "attend": attend_and_write,
            "baselines": [PLAIN],
            "limits": LIMITS,
            "cache_bytes": 3000,
            "free_bytes": lambda: 1 << 30,
            "capture": capture,
        }
        return main.Machine(**(defaults | settings))

    return make
