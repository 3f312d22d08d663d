"""The row of a point, by a stand-in for a GPU."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from benchmarks.gpu import baselines, gate, main, timing
from benchmarks.gpu.retrieval_kernels import Kernel
from tests.benchmarks.gpu.toys import LIMITS, PLAIN, STAND_IN, toy
from tests.ops.triton_cases import implementation  # noqa: F401 - a fixture
from vllm_duo.ops.layer.triton import attend_and_write


def test_row_of_a_point(machine):
    row = main.measure(toy(20, 1), machine())
    # Captured in this order, each taking as many milliseconds a layer.
    medians = {name: each["median_ms"] for name, each in row["contenders"].items()}
    assert medians == {"duo 0%": 1.0, "duo 50%": 2.0, "duo 100%": 3.0, "plain": 4.0}
    assert row["layers"] > 1
    assert row["baseline"] == "plain"
    half = row["contenders"]["duo 50%"]
    assert half["times_best"] == 2.0
    assert half["bytes"] == toy(20, 1).work(1).num_bytes
    assert half["gb_s"] == pytest.approx(half["bytes"] / 2e-3 / 1e9)
    assert half["share_of_limit"] == pytest.approx(half["gb_s"] / LIMITS.copy_gb_s)
    assert half["limit"] == "memory"
    assert {"p25_ms", "p75_ms", "min_ms", "max_ms", "error"} <= set(half)
    assert row["differences"]["plain"] <= gate.WHOLE_BOUND
    assert json.loads(json.dumps(row)) == row


def test_the_fastest_full_attention_counts(machine):
    slower = dataclasses.replace(PLAIN, name="slower")
    row = main.measure(toy(20, 1, sparsities=(0.5,)), machine(baselines=[PLAIN, slower]))
    assert row["baseline"] == "plain"
    assert row["contenders"]["slower"]["times_best"] == pytest.approx(2 / 3)


def test_a_wrong_kernel_gets_no_time(machine):
    def wrong(*arguments, retrieval_prefill):
        attend_and_write(*arguments)
        arguments[-1].mul_(1.2)

    row = main.measure(toy(20, 1), machine(attend=wrong))
    assert "duo 0% is wrong at toy" in row["failed"]
    assert "contenders" not in row


class TestRetrievalKernels:
    POINT = toy(14, 6)

    def test_each_is_a_contender_of_prefills(self, machine):
        row = main.measure(self.POINT, machine(kernels=[STAND_IN]))
        assert list(row["contenders"]) == [
            "duo 0%",
            "duo 50%",
            "duo 100%",
            "duo 0%, stand-in",
            "duo 50%, stand-in",
            "plain",
        ]
        half = row["contenders"]["duo 50%, stand-in"]
        assert half["bytes"] == self.POINT.work(1).num_bytes
        assert half["times_best"] == pytest.approx(6 / 5)
        assert row["baseline"] == "plain"
        assert "error" in half

    def test_each_layer_has_a_plan_of_its_own(self, machine):
        """Captured graphs keep a plan: a layer must not plan anew after another one has."""
        made = []

        def make():
            kernel = STAND_IN.make()
            made.append(kernel)
            return kernel

        row = main.measure(self.POINT, machine(kernels=[Kernel("stand-in", make)]))
        assert row["layers"] > 1
        assert len(made) == 2 * row["layers"]
        assert all(len(kernel._planned) <= 1 for kernel in made)

    def test_decodes_have_none(self, machine):
        row = main.measure(toy(20, 1), machine(kernels=[STAND_IN]))
        assert list(row["contenders"]) == ["duo 0%", "duo 50%", "duo 100%", "plain"]

    def test_a_wrong_one_is_left_out(self, machine):
        def wrong(query, heads, caches, batch, scale, output):
            output[:, :, 0] = 7.0

        def broken(*arguments):
            raise RuntimeError("no kernel image")

        kernels = [Kernel("wrong", lambda: wrong), Kernel("broken", lambda: broken)]
        row = main.measure(self.POINT, machine(kernels=kernels))
        assert list(row["contenders"]) == ["duo 0%", "duo 50%", "duo 100%", "plain"]
        assert row["left_out"]["duo 0%, wrong"].startswith(
            "GateError: duo 0%, wrong is wrong at toy"
        )
        assert row["left_out"]["duo 50%, broken"] == "RuntimeError: no kernel image"


def test_without_a_right_baseline_there_is_no_ratio(machine):
    def wrong(layer):
        run = baselines.plain(layer)
        return lambda: run() * 1.5

    row = main.measure(toy(20, 1), machine(baselines=[baselines.Baseline("wrong", wrong)]))
    assert row["failed"].startswith("no full attention to compare with: {'wrong': ")


def test_points_that_do_not_fit_are_named(machine):
    row = main.measure(toy(20, 1), machine(free_bytes=lambda: 100))
    assert row["skipped"].startswith("does not fit the memory: needs ")


def test_copies_are_left_out_before_the_point_is(machine):
    point = toy(400, 1, 8, sparsities=(0.5,))
    free = (timing.layer_bytes(point, 1) + timing.layer_bytes(point, 2)) // 2
    paged = dataclasses.replace(PLAIN, name="paged", is_dense=False)
    settings = {"baselines": [PLAIN, paged], "free_bytes": lambda: int(free / 0.9)}
    row = main.measure(point, machine(**settings))
    assert row["baseline"] == "paged"
    assert row["left_out"] == {"plain": "its copy of the cache does not fit beside the cache"}


def test_memory_that_runs_out_skips_the_point(machine):
    def full(steps):
        raise torch.cuda.OutOfMemoryError("out of memory")

    row = main.measure(toy(20, 1), machine(capture=full))
    assert row["skipped"].startswith("does not fit the memory")
