"""The points of the GPU benchmark, and the least work that each of them is."""

from __future__ import annotations

import pytest

from benchmarks.gpu import cases, main
from benchmarks.gpu.cases import Point, Work
from tests.benchmarks.gpu.toys import LIMITS, LLAMA_2, LLAMA_3, TOY, toy


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
