"""The gate of the GPU benchmark: a wrong kernel is not timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import baselines, gate
from benchmarks.gpu.layer import Layer
from benchmarks.gpu.retrieval_kernels import Kernel
from tests.benchmarks.gpu.toys import CPU, LLAMA_3, PLAIN, STAND_IN, TOY, few, toy
from tests.ops.triton_cases import implementation  # noqa: F401 - a fixture
from vllm_duo.ops.layer.triton import attend_and_write


class TestGate:
    def test_right_kernels_pass(self):
        found = gate.check_small(CPU, attend_and_write, [PLAIN], [TOY], few, [STAND_IN])
        assert found == ([PLAIN], [STAND_IN], {})

    def test_small_points_wrap_the_ring_and_start_from_nothing(self):
        points = list(gate.small_points([LLAMA_3]))
        assert {point.before for point in points} >= {0, 700}
        assert {point.kind for point in points} == {"decode", "prefill"}

    @pytest.mark.parametrize("sparsities", [(0.0,), (1.0,)], ids=["retrieval", "streaming"])
    def test_a_wrong_result_stops_everything(self, sparsities):
        def wrong(*arguments, retrieval_prefill):
            attend_and_write(*arguments)
            arguments[-1][..., 3] *= 1.2

        points = lambda shapes: iter([toy(20, 1, sparsities=sparsities)])  # noqa: E731
        with pytest.raises(
            gate.GateError, match=r"duo \d+% is wrong at toy, decode, 2 x 21 tokens"
        ):
            gate.check_small(CPU, wrong, [PLAIN], [TOY], points)

    def test_an_output_that_was_not_written_is_wrong(self):
        with pytest.raises(gate.GateError, match="got nan"):
            gate.check_small(CPU, lambda *arguments, **others: None, [PLAIN], [TOY], few)

    def test_a_ring_that_was_not_written_is_wrong(self):
        def forgetful(*arguments, retrieval_prefill):
            ring = arguments[4].streaming
            before = None if ring is None else ring.clone()
            attend_and_write(*arguments)
            if before is not None:
                ring.copy_(before)

        with pytest.raises(gate.GateError, match="left other tokens in the ring of request 0"):
            gate.check_small(CPU, forgetful, [PLAIN], [TOY], few)

    def test_a_wrong_baseline_is_left_out_with_its_reason(self):
        def wrong(layer):
            run = baselines.plain(layer)
            return lambda: run() * 1.5

        def broken(layer):
            raise RuntimeError("no kernel image")

        others = [baselines.Baseline("wrong", wrong), baselines.Baseline("broken", broken)]
        found = gate.check_small(CPU, attend_and_write, [PLAIN, *others], [TOY], few)
        right, _, problems = found
        assert right == [PLAIN]
        assert problems["wrong"].startswith("GateError: wrong is wrong at toy")
        assert problems["broken"] == "RuntimeError: no kernel image"

    def test_a_wrong_kernel_for_the_retrieval_heads_is_left_out(self):
        """One that does nothing is wrong, one that fails is told."""

        def broken(*arguments):
            raise RuntimeError("no kernel image")

        kernels = [Kernel("idle", lambda: lambda *_: None), Kernel("broken", lambda: broken)]
        found = gate.check_small(CPU, attend_and_write, [PLAIN], [TOY], few, [STAND_IN, *kernels])
        assert found[:2] == ([PLAIN], [STAND_IN])
        assert found[2]["idle"].startswith("GateError: idle is wrong at toy, chunk of 6")
        assert found[2]["broken"] == "RuntimeError: no kernel image"

    def test_reference_is_the_rule(self):
        """Against attention with a whole mask, by another way."""
        layer = Layer(toy(14, 6, 1), CPU)
        keys, values = (part[0].double().repeat_interleave(2, 0) for part in layer.dense)
        query = layer.query.double().transpose(0, 1)
        i, j = torch.arange(14, 20)[:, None], torch.arange(20)
        causal = j <= i
        streaming = causal & ((j < 3) | (j > i - 9))
        mask = torch.stack([streaming, streaming, causal, causal])
        logits = (query @ keys.transpose(1, 2) / 4).masked_fill(~mask, -torch.inf)
        expected = (logits.softmax(-1) @ values).transpose(0, 1)
        assert torch.allclose(gate.reference(layer, 1, range(6)), expected, rtol=1e-12)

    def test_rows_are_taken_over_the_whole_step(self):
        assert gate.sampled(toy(20, 1, 1)) == [0]
        assert gate.sampled(toy(20, 1, 64)) == [0, 21, 42, 63]

    def test_whole_outputs_may_differ_by_rounding_alone(self):
        output = torch.randn(50, 4, 16)
        rounded = output.bfloat16().float()
        assert gate.check_whole("full", output, rounded, toy(20, 1)) < 0.003
        with pytest.raises(gate.GateError, match=r"full disagree at .*at most 0.01"):
            gate.check_whole("full", output, output * 1.02, toy(20, 1))
