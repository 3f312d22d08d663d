"""The GPU benchmark without a GPU: cases, arithmetic, gate, table and refusal.

Where attention is computed the Triton kernels run in Triton's interpreter, at toy sizes.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import attention
from benchmarks.gpu import baselines, cases, gate, main, results, timing
from benchmarks.gpu.cases import MODELS, Limits, Point, Shape, Work
from benchmarks.gpu.layer import DuoStep, Layer
from tests.ops.triton_cases import (
    implementation,  # noqa: F401
)
from vllm_duo.ops.layer.triton import attend_and_write

ROOT = Path(__file__).parents[2]
LLAMA_3, LLAMA_2 = MODELS["Llama-3-8B"], MODELS["Llama-2-7B"]
TOY = Shape(
    name="toy",
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    block_size=4,
    sink_size=3,
    recent_size=9,
)
CPU = torch.device("cpu")
LIMITS = Limits(copy_gb_s=1000.0, gemm_tflop_s=10.0)
PLAIN = baselines.Baseline("plain", baselines.plain, is_dense=True)


def toy(before: int, chunk: int, requests: int = 2, sparsities=(0.0, 0.5, 1.0)) -> Point:
    return Point(
        shape=TOY, context=before + chunk, chunk=chunk, requests=requests, sparsities=sparsities
    )


def few(shapes):
    return iter([toy(20, 1), toy(14, 6, 1)])


class TestCases:
    def test_cover_what_is_claimed(self):
        every = list(cases.points())
        decodes = [point for point in every if point.kind == "decode"]
        assert {point.context for point in decodes} == {1024 * 4**power for power in range(6)}
        assert {point.requests for point in decodes} == {1, 4, 16, 64}
        assert {point.chunk for point in every} == {1, 2048, 8192}
        assert {point.shape.name for point in every} == {"Llama-3-8B", "Llama-2-7B"}
        assert {point.sparsities for point in every} == {(0.0, 0.25, 0.5, 0.75)}
        assert (LLAMA_3.num_heads, LLAMA_3.num_kv_heads, LLAMA_3.head_size) == (32, 8, 128)
        assert (LLAMA_2.num_heads, LLAMA_2.num_kv_heads, LLAMA_2.head_size) == (32, 32, 128)

    def test_a_chunk_is_part_of_its_context(self):
        assert all(point.before >= 0 for point in cases.points())
        (whole,) = cases.points(
            models=["Llama-3-8B"], kinds=["prefill"], contexts=[2048], chunks=[2048, 8192]
        )
        assert (whole.chunk, whole.before) == (2048, 0)

    def test_short_contexts_come_first(self):
        contexts = [point.context for point in cases.points()]
        assert contexts == sorted(contexts)

    def test_smoke_is_a_few(self):
        arguments = main.parser().parse_args(["--smoke"])
        found = main.points(arguments)
        assert len(found) < 12
        assert {point.kind for point in found} == {"decode", "prefill"}

    def test_flags_choose(self):
        flags = "--models Llama-2-7B --kinds decode --contexts 4096 --requests 2 --sparsities 0.5"
        (point,) = main.points(main.parser().parse_args(flags.split()))
        expected = Point(shape=LLAMA_2, context=4096, requests=2, sparsities=(0.5,))
        assert point == expected

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            ("--sparsities 1.5", "expected a share from 0 to 1, got 1.5"),
            ("--contexts 0", "expected a whole number from 1, got 0"),
            ("--models Llama-9", "invalid choice: 'Llama-9'"),
        ],
    )
    def test_bad_flags_are_named(self, flags, said, capsys):
        with pytest.raises(SystemExit):
            main.parser().parse_args(flags.split())
        assert said in capsys.readouterr().err


class TestWork:
    def test_decode_reads_each_key_once(self):
        """The worked example of ``Point.work``."""
        work = Point(shape=LLAMA_3, context=1024).work(4)
        assert work.num_bytes == 4 * (1023 + 319) * 512 + 2 * 8 * 512 + 2 * 32 * 256
        assert work.flop == 4 * (1024 + 320) * 4 * 4 * 128

    def test_nothing_is_left_out_of_a_short_context(self):
        point = Point(shape=LLAMA_3, context=100)
        assert point.work(8) == point.work(0)

    def test_streaming_heads_cost_the_same_at_any_length(self):
        short, long = (Point(shape=LLAMA_3, context=n) for n in (4096, 1 << 20))
        assert short.work(8) == long.work(8)

    def test_requests_multiply(self):
        one, many = (Point(shape=LLAMA_3, context=4096, requests=n) for n in (1, 16))
        assert many.work(2) == Work(16 * one.work(2).num_bytes, 16 * one.work(2).flop)

    def test_a_baseline_writes_nothing(self):
        point = Point(shape=LLAMA_3, context=4096)
        difference = point.work(0).num_bytes - point.work(0, writes=False).num_bytes
        assert difference == 8 * 512

    @pytest.mark.parametrize("chunk", [1, 7])
    @pytest.mark.parametrize("before", [0, 2, 11, 30])
    def test_visible_pairs_are_those_of_the_rule(self, before, chunk):
        point = toy(before, chunk)
        queries = range(before, before + chunk)
        causal = sum(j <= i for i in queries for j in range(point.context))
        kept = sum(
            j <= i and (j < TOY.sink_size or j > i - TOY.recent_size)
            for i in queries
            for j in range(point.context)
        )
        assert point.visible() == causal
        assert point.visible(TOY.sink_size + TOY.recent_size) == kept

    def test_the_nearer_limit_counts(self):
        assert LIMITS.least_ms(Work(num_bytes=2 * 10**9, flop=10**9)) == (2.0, "memory")
        assert LIMITS.least_ms(Work(num_bytes=10**3, flop=3 * 10**10)) == (3.0, "arithmetic")


class TestMemory:
    """Of an H200: 60 MB of L2, and 139 GiB."""

    L2, FREE = 60 << 20, 139 << 30

    def layers(self, free=FREE, copies=2, **sizes):
        return timing.layers_in_turn(Point(shape=LLAMA_2, **sizes), self.L2, copies, free)

    def test_small_caches_take_turns_so_that_none_stays_in_the_l2(self):
        small = Point(shape=LLAMA_3, context=1024)
        assert timing.layers_in_turn(small, self.L2, 2, self.FREE) == timing.LAYERS
        assert self.layers(context=1 << 20) == 1
        point = Point(shape=LLAMA_2, context=4096)
        layers = self.layers(context=4096)
        assert 1 < layers < timing.LAYERS
        assert layers * point.work(24).num_bytes >= 3 * self.L2

    def test_fewer_layers_where_memory_is_short(self):
        one = timing.layer_bytes(Point(shape=LLAMA_2, context=1024), 2)
        assert self.layers(context=1024, free=5 * one) == 4

    def test_what_does_not_fit(self):
        assert self.layers(context=1 << 20, requests=64) == 0

    def test_a_layer_holds_the_cache_as_often_as_it_is_copied(self):
        point = Point(shape=LLAMA_3, context=1 << 20)
        copies = timing.layer_bytes(point, 2) - timing.layer_bytes(point, 1)
        assert copies == point.cache_bytes == (1 << 20) * 8 * 512


class TestLayer:
    @pytest.mark.parametrize("before", [0, 2, 5, 12, 40])
    def test_ring_holds_what_is_left_of_the_context(self, before):
        """Slot by slot: the position that it holds by the definition of ``RingTable``."""
        layer = Layer(toy(before, 1), CPU)
        step = DuoStep(layer, 1, attend_and_write)
        ring, cache = step.caches.ring, step.caches.streaming
        held = {}
        for position in range(before):
            sink = position < TOY.sink_size
            turn = TOY.sink_size + (position - TOY.sink_size) % TOY.recent_size
            held[position if sink else turn] = position
        for request in range(2):
            for slot, position in held.items():
                column, offset = divmod(slot, TOY.block_size)
                rows = layer.rows(request, torch.tensor([position]))
                block = int(ring.block_table[request, column])
                assert torch.equal(cache[block, 0, offset], rows[0, 0])

    def test_retrieval_cache_is_a_view(self):
        layer = Layer(toy(20, 1), CPU)
        step = DuoStep(layer, 1, attend_and_write)
        assert step.caches.retrieval.data_ptr() == layer.cache[:, 1:].data_ptr()

    def test_dense_keys_are_those_of_the_pages(self):
        layer = Layer(toy(20, 3), CPU)
        keys, values = layer.dense
        rows = torch.cat([keys, values], -1)[1].transpose(0, 1)
        assert torch.equal(rows, layer.rows(1, torch.arange(23)))
        assert torch.equal(rows[20:, :, :16], layer.key[3:])

    def test_seeds_differ(self):
        one, other = (Layer(toy(20, 1), CPU, seed).query for seed in (0, 1))
        assert not torch.equal(one, other)


class TestGate:
    def test_right_kernels_pass(self):
        right, problems = gate.check_small(CPU, attend_and_write, [PLAIN], [TOY], few)
        assert (right, problems) == ([PLAIN], {})

    def test_small_points_wrap_the_ring_and_start_from_nothing(self):
        points = list(gate.small_points([LLAMA_3]))
        assert {point.before for point in points} >= {0, 700}
        assert {point.kind for point in points} == {"decode", "prefill"}

    @pytest.mark.parametrize("sparsities", [(0.0,), (1.0,)], ids=["retrieval", "streaming"])
    def test_a_wrong_result_stops_everything(self, sparsities):
        def wrong(*arguments):
            attend_and_write(*arguments)
            arguments[-1][..., 3] *= 1.2

        points = lambda shapes: iter([toy(20, 1, sparsities=sparsities)])  # noqa: E731
        with pytest.raises(
            gate.GateError, match=r"duo \d+% is wrong at toy, decode, 2 x 21 tokens"
        ):
            gate.check_small(CPU, wrong, [PLAIN], [TOY], points)

    def test_an_output_that_was_not_written_is_wrong(self):
        with pytest.raises(gate.GateError, match="got nan"):
            gate.check_small(CPU, lambda *arguments: None, [PLAIN], [TOY], few)

    def test_a_ring_that_was_not_written_is_wrong(self):
        def forgetful(*arguments):
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
        right, problems = gate.check_small(CPU, attend_and_write, [PLAIN, *others], [TOY], few)
        assert right == [PLAIN]
        assert problems["wrong"].startswith("GateError: wrong is wrong at toy")
        assert problems["broken"] == "RuntimeError: no kernel image"

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


class TestBaselines:
    def test_merged_pieces_are_the_whole(self):
        logits, values = torch.randn(5, 40, dtype=torch.float64), torch.randn(40, 8).double()

        def over(piece):
            part = logits[:, piece]
            return part.softmax(-1) @ values[piece], part.logsumexp(-1, keepdim=True)

        merged = baselines.merge(*over(slice(0, 30)), *over(slice(30, 40)))
        assert torch.allclose(merged, logits.softmax(-1) @ values)

    @pytest.mark.parametrize("chunk", [1, 70])
    @pytest.mark.parametrize("prepare", [baselines.torch_flash, baselines.torch_cudnn])
    def test_torchs_operators_take_what_we_pass(self, prepare, chunk):
        """Without their kernels: what PyTorch knows of their arguments and shapes."""
        point = Point(shape=LLAMA_3, context=700 + chunk, chunk=chunk, requests=2)

        def empty(*sizes):
            return torch.empty(*sizes, 128, device="meta", dtype=torch.bfloat16)

        keys = empty(2, 8, point.context)
        layer = Namespace(point=point, query=empty(2 * chunk, 32), dense=(keys, keys))
        assert prepare(layer)().shape == (2 * chunk, 32, 128)

    @pytest.mark.parametrize("before", [0, 14])
    def test_cudnn_is_asked_for_context_and_chunk(self, before, monkeypatch):
        """With cuDNN's causal mask, from the first key, and heads that it will not share."""
        asked = []

        def operator(query, keys, values, bias, lse, dropout, causal, debug, *, scale):
            if query.shape[1] != keys.shape[1]:
                raise RuntimeError("heads")
            asked.append((keys.shape[2], causal))
            logits = query.double() @ keys.double().transpose(2, 3) * scale
            if causal:
                logits = logits.masked_fill(~torch.ones(logits.shape[2:]).tril().bool(), -torch.inf)
            out = (logits.softmax(-1) @ values.double()).to(query.dtype)
            return out, logits.logsumexp(-1).float(), None

        monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", operator)
        layer = Layer(toy(before, 6, 1), CPU)
        output = baselines.torch_cudnn(layer)()
        assert asked == [(6, True), (14, False)][: 1 + bool(before)]
        gate.check_rows("cudnn", output, layer, 0, range(6))

    def test_flashinfer_is_planned_for_the_pages(self, monkeypatch):
        """A stand-in that attends by the plan."""
        planned = []

        class Wrapper:
            def __init__(self, workspace, layout, use_tensor_cores=None):
                assert layout == "HND"
                assert workspace.dtype == torch.uint8

            def plan(self, *plan, **types):
                planned.append((plan, types))

            def run(self, query, caches, out):
                *_, pages, blocks, last, heads, kv_heads, size, block = planned[-1][0]
                assert (heads, kv_heads, size, block) == (4, 2, 16, 4)
                for request, (begin, end) in enumerate(itertools.pairwise(pages.tolist())):
                    own = blocks[begin:end].long()
                    count = (end - begin - 1) * block + int(last[request])
                    k, v = (
                        cache[own].transpose(1, 2).flatten(0, 1)[:count].repeat_interleave(2, 1)
                        for cache in caches
                    )
                    weights = torch.einsum("hd,nhd->hn", query[request].float(), k.float()) / 4
                    out[request] = torch.einsum("hn,nhd->hd", weights.softmax(-1), v.float())
                return out

        names = ("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper")
        stand_in = Namespace(**dict.fromkeys(names, Wrapper))
        monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
        monkeypatch.setattr(baselines, "WORKSPACE_BYTES", 16)
        layer = Layer(toy(20, 1), CPU)
        gate.check_rows("flashinfer", baselines.flashinfer_paged(layer)(), layer, 0, range(2))
        plan, types = planned[0]
        assert types == {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        assert len(plan) == 7
        baselines.flashinfer_paged(Layer(toy(14, 6, 1), CPU))
        plan, types = planned[1]
        assert plan[0].tolist() == [0, 6]
        assert types["causal"] is True

    def test_vllms_flash_attention_takes_the_pages(self):
        """A stand-in that attends over them, called as the contract tests check."""

        def function(q, k, v, cu_seqlens_q, max_seqlen_q, seqused_k, **others):
            assert others["fa_version"] == 3
            assert others["causal"] is True
            assert (max_seqlen_q, others["max_seqlen_k"]) == (1, 21)
            rows = []
            for request, table in enumerate(others["block_table"].long()):
                keys, values = (
                    part[table].flatten(0, 1)[: int(seqused_k[request])].repeat_interleave(2, 1)
                    for part in (k, v)
                )
                token = q[int(cu_seqlens_q[request])].float()
                logits = torch.einsum("hd,nhd->hn", token, keys.float()) * others["softmax_scale"]
                rows.append(torch.einsum("hn,nhd->hd", logits.softmax(-1), values.float()))
            return torch.stack(rows).to(q.dtype)

        layer = Layer(toy(20, 1), CPU)
        run = baselines.vllm_flash_attention(layer, function=function, fa_version=3)
        gate.check_rows("flash", run(), layer, 0, range(2))

    def test_what_is_missing_is_said(self):
        found = list(baselines.installed(torch.device("cuda", 0)))
        missing = dict(each for each in found if isinstance(each, tuple))
        assert "FlashAttention of vLLM" in missing
        names = [each.name for each in found if isinstance(each, baselines.Baseline)]
        assert f"FlashAttention 2 of torch {torch.__version__}" in names


@pytest.fixture
def machine():
    """Makes a stand-in for a GPU: a clock that gives each contender its own time."""

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


class TestMeasure:
    def test_row_of_a_point(self, machine):
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

    def test_the_fastest_full_attention_counts(self, machine):
        slower = dataclasses.replace(PLAIN, name="slower")
        row = main.measure(toy(20, 1, sparsities=(0.5,)), machine(baselines=[PLAIN, slower]))
        assert row["baseline"] == "plain"
        assert row["contenders"]["slower"]["times_best"] == pytest.approx(2 / 3)

    def test_a_wrong_kernel_gets_no_time(self, machine):
        def wrong(*arguments):
            attend_and_write(*arguments)
            arguments[-1].mul_(1.2)

        row = main.measure(toy(20, 1), machine(attend=wrong))
        assert "duo 0% is wrong at toy" in row["failed"]
        assert "contenders" not in row

    def test_without_a_right_baseline_there_is_no_ratio(self, machine):
        def wrong(layer):
            run = baselines.plain(layer)
            return lambda: run() * 1.5

        row = main.measure(toy(20, 1), machine(baselines=[baselines.Baseline("wrong", wrong)]))
        assert row["failed"].startswith("no full attention to compare with: {'wrong': ")

    def test_points_that_do_not_fit_are_named(self, machine):
        row = main.measure(toy(20, 1), machine(free_bytes=lambda: 100))
        assert row["skipped"].startswith("does not fit the memory: needs ")

    def test_copies_are_left_out_before_the_point_is(self, machine):
        point = toy(400, 1, 8, sparsities=(0.5,))
        free = (timing.layer_bytes(point, 1) + timing.layer_bytes(point, 2)) // 2
        paged = dataclasses.replace(PLAIN, name="paged", is_dense=False)
        settings = {"baselines": [PLAIN, paged], "free_bytes": lambda: int(free / 0.9)}
        row = main.measure(point, machine(**settings))
        assert row["baseline"] == "paged"
        assert row["left_out"] == {"plain": "its copy of the cache does not fit beside the cache"}

    def test_memory_that_runs_out_skips_the_point(self, machine):
        def full(steps):
            raise torch.cuda.OutOfMemoryError("out of memory")

        row = main.measure(toy(20, 1), machine(capture=full))
        assert row["skipped"].startswith("does not fit the memory")

    def test_turns_are_as_many_as_there_is_time(self):
        calls = []

        def replay(milliseconds):
            def run(repeats):
                calls.append(repeats)
                return milliseconds

            return run

        quick, slow = timing.take_turns([replay(0.1), replay(0.5)])
        assert (len(quick), len(slow)) == (25, 25)
        assert set(calls) == {1, 50, 10}
        (rare,) = timing.take_turns([replay(1000.0)])
        assert len(rare) == timing.FEWEST_ROUNDS

    def test_spread(self):
        found = timing.spread([4.0, 1.0, 2.0, 3.0, 10.0])
        assert found == {
            "median_ms": 3.0,
            "p25_ms": 2.0,
            "p75_ms": 4.0,
            "min_ms": 1.0,
            "max_ms": 10.0,
            "rounds": 5,
        }


class TestRun:
    @pytest.fixture
    def out(self, tmp_path):
        return Namespace(
            out=tmp_path / "a" / "r.json", plot=tmp_path / "b" / "r.png", max_seconds=1e9
        )

    def test_writes_json_a_table_and_a_plot(self, machine, out):
        said = io.StringIO()
        result = {"device": "a GPU", "baselines": ["plain"]}
        points = [toy(20, 1), toy(40, 1), toy(14, 6, 1)]
        main.run(points, machine(), out, result, Console(file=said, width=200))
        written = json.loads(out.out.read_text())
        assert [row["context"] for row in written["points"]] == [21, 41, 20]
        assert written["device"] == "a GPU"
        assert out.plot.read_bytes().startswith(b"\x89PNG")
        table = said.getvalue()
        for text in ("duo 50%", "plain (best full)", "2 x 21", "chunk 6", "memory", "x best full"):
            assert text in table

    def test_what_is_left_after_the_time_is_listed(self, machine, out):
        out.max_seconds = -1
        said = io.StringIO()
        result = {"device": "a GPU", "baselines": ["plain"]}
        rows = main.run([toy(20, 1)], machine(), out, result, Console(file=said, width=200))
        assert rows[0]["skipped"] == "after -1 s (--max-seconds)"
        assert "after -1 s (--max-seconds)" in said.getvalue()
        assert not out.plot.exists()

    def test_nothing_to_plot_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="no point was measured"):
            results.plot([{"skipped": "why"}], tmp_path / "none.png", "title")


class TestWithoutAGpu:
    def test_it_says_what_to_do(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert attention.main(["--device", "cuda", "--smoke"]) == 2
        said = capsys.readouterr().out
        assert said.startswith("benchmarks.attention --device cuda: expected a PyTorch built for")
        assert f"got torch {torch.__version__} with " in said
        assert "or measure this processor with --device cpu" in said
        assert said.count("\n") == 1

    def test_an_older_gpu_is_refused_too(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a T4")
        assert "got a T4 of compute capability (7, 5)" in main.refusal()

    def test_failed_gate_times_nothing(self, monkeypatch, capsys):
        monkeypatch.setattr(main, "refusal", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(baselines, "installed", lambda device: iter([("full", "is missing")]))
        monkeypatch.setattr(gate, "check_small", lambda *arguments: ([], {}))
        assert main.main([]) == 1
        said = capsys.readouterr().out
        assert "the correctness gate failed, nothing was timed" in said
        assert "{'full': 'is missing'}" in said

    @pytest.fixture
    def device(self, monkeypatch):
        """What ``main`` asks of a device, as of an H200; nothing is computed on it."""
        properties = Namespace(
            name="NVIDIA H200",
            major=9,
            minor=0,
            multi_processor_count=132,
            total_memory=139 << 30,
            L2_cache_size=60 << 20,
        )
        monkeypatch.setattr(main, "refusal", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (130 << 30, 139 << 30))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(timing, "measure_limits", lambda device: Limits(4300.0, 790.0))
        found = [PLAIN, ("FlashInfer", "no module")]
        monkeypatch.setattr(baselines, "installed", lambda device: iter(found))
        monkeypatch.setattr(gate, "check_small", lambda *arguments: ([PLAIN], {"other": "wrong"}))

    def test_from_flags_to_files(self, device, monkeypatch, capsys, tmp_path):
        def measure(point, machine):
            assert machine.free_bytes() == 130 << 30
            assert machine.cache_bytes == 60 << 20
            names = [*map(gate.contender, point.sparsities), "plain"]
            times = {name: [2.0 + n, 1.0 + n] for n, name in enumerate(names)}
            return results.times_row(point, times, 4, machine.limits)

        monkeypatch.setattr(main, "measure", measure)
        out, drawn = tmp_path / "r.json", tmp_path / "r.svg"
        flags = ["--device", "cuda", "--smoke", "--out", str(out), "--plot", str(drawn)]
        assert attention.main(flags) == 0
        written = json.loads(out.read_text())
        assert written["device"] == "NVIDIA H200"
        assert written["limits"] == {"copy_gb_s": 4300.0, "gemm_tflop_s": 790.0}
        assert written["baselines"] == ["plain"]
        assert written["not_compared"] == {"FlashInfer": "no module", "other": "wrong"}
        assert written["triton"]
        assert len(written["points"]) == len(main.points(main.parser().parse_args(["--smoke"])))
        assert drawn.read_text().startswith("<?xml")
        assert "Llama-2-7B" in capsys.readouterr().out

    def test_a_failed_point_is_an_exit_code(self, device, monkeypatch, capsys):
        monkeypatch.setattr(
            main, "measure", lambda point, machine: {**results.point_row(point), "failed": "wrong"}
        )
        assert attention.main(["--device", "cuda", "--smoke"]) == 1
        assert "wrong" in capsys.readouterr().out

    def test_imports_need_no_vllm_and_no_package_that_a_bare_gpu_machine_lacks(self):
        """As in a folder of sources on a machine with torch, Triton, NumPy, rich and matplotlib."""
        code = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vllm", "pydantic", "typer", "flashinfer") or name == "vllm_duo._cpu":
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Blocker())
import os
os.environ["VLLM_DUO_OPS"] = "reference"
from benchmarks import attention
from benchmarks.gpu import main
from vllm_duo.ops.layer import triton
assert not [name for name in sys.modules if name.split(".")[0] in ("vllm", "pydantic")]
raise SystemExit(attention.main(["--device", "cuda"]))
"""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stderr
        assert "expected a PyTorch built for CUDA" in done.stdout

    def test_kernels_for_cpus_are_missed_only_when_one_is_to_run(self):
        code = """
import sys
sys.modules["vllm_duo._cpu"] = None
from vllm_duo.ops import cpu
print(cpu.describe())
cpu.use_reference = False
cpu.supported_isas()
"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"VLLM_DUO_OPS": "reference", "PATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == "PyTorch references (VLLM_DUO_OPS=reference)\n"
        assert "compiled kernels (vllm_duo._cpu) are missing" in done.stderr
