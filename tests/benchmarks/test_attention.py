"""The CPU attention benchmarks: their gate, their counting, and what they make of the times."""

import itertools

import pytest
import torch

from benchmarks import attention_cpu as attention
from benchmarks import decode_step
from benchmarks.attention_layers import DuoLayer, Shape

SHAPE = Shape(dtype=torch.float32, num_heads=4, num_kv_heads=2, context=1023, chunk=1)
PAIR = 2 * 64 * 4  # bytes of a key and its value


class TestGate:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("sparsity", [0.0, 0.5])
    def test_both_kernels_agree(self, dtype, sparsity):
        """Nearly: they sum in another order, and no difference at all would be one kernel twice."""
        assert attention.gate(dtype, 4, 2, sparsity) > 0

    def test_a_wrong_result_stops_everything(self, monkeypatch):
        step = DuoLayer.step

        def wrong(self, *args):
            run = step(self, *args)
            return lambda: run() * 1.001

        monkeypatch.setattr(DuoLayer, "step", wrong)
        with pytest.raises(RuntimeError, match="results differ"):
            attention.gate(torch.float32, 4, 2, 0.5)


def test_needed_bytes_count_the_window_of_streaming_heads():
    assert SHAPE.needed_bytes(0) == 2 * 1024 * PAIR
    assert SHAPE.needed_bytes(1) == (1024 + 64 + 256) * PAIR


def test_streaming_cost_is_the_same_at_any_length():
    (case,) = [
        case
        for case in attention.cases(smoke=False)
        if (case.name, case.shape.dtype, case.shape.num_kv_heads)
        == ("streaming", torch.float32, 16)
    ]
    short, long = case.contenders
    assert long.shape(case).context > 200 * short.shape(case).context
    assert long.shape(case).needed_bytes(16) == short.shape(case).needed_bytes(16)


def test_rows_hold_the_ratio_to_the_first_contender(monkeypatch):
    ticks = itertools.cycle([2e-3, 1e-3])

    def alternate(works, rounds, slice_s):
        return [[next(ticks)] * rounds for _ in works]

    monkeypatch.setattr(attention, "alternate", alternate)
    contenders = (attention.STOCK, attention.HALF)
    case = attention.Case(name="decode", shape=SHAPE, contenders=contenders)
    stock, half = attention.measure(case, {"read_gb_s": 10.0})
    assert (stock["kernels"], half["kernels"]) == ("stock", "duo 50%")
    assert (stock["times_first"], half["times_first"]) == (1.0, 2.0)
    assert half["gb_s"] == pytest.approx((1024 + 320) * PAIR / 1e-3 / 1e9)
    assert half["share_of_read"] == pytest.approx(half["gb_s"] / 10)


class TestDecodeStep:
    def settings(self, sparsity):
        return decode_step.Settings(
            kv_heads=4, sparsity=sparsity, context=64, dtype="float32", threads=1, compiled=False
        )

    def test_explained_is_what_quicker_attention_alone_would_give(self):
        rows = [
            decode_step.row(self.settings(None), [(0.010, 0.008)] * 3),
            decode_step.row(self.settings(0.5), [(0.006, 0.004)] * 3),
        ]
        decode_step.compare(rows)
        stock, duo = rows
        assert stock["of_explained"] == pytest.approx(1)
        assert duo["attention_times_stock"] == pytest.approx(2)
        assert duo["explained"] == pytest.approx(10 / 6)
        assert duo["of_explained"] == pytest.approx(1)

    def test_time_lost_around_attention_shows(self):
        rows = [
            decode_step.row(self.settings(None), [(0.010, 0.008)]),
            decode_step.row(self.settings(0.5), [(0.008, 0.004)]),
        ]
        decode_step.compare(rows)
        assert rows[1]["of_explained"] == pytest.approx(6 / 8)

    def test_the_clock_counts_attention_and_can_leave_it_out(self):
        class Layer:
            def forward(self, output=None):
                return "attended"

        clock = decode_step.AttentionClock([Layer])
        assert Layer().forward(output="untouched") == "attended"
        assert clock.seconds > 0
        clock.on = False
        assert Layer().forward(output="untouched") == "untouched"
