"""How many layers take turns, how often each contender runs, and what is told of the times."""

from __future__ import annotations

from benchmarks.gpu import timing
from benchmarks.gpu.cases import Point
from tests.benchmarks.gpu.toys import LLAMA_2, LLAMA_3


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

    def test_another_kernel_has_outputs_and_rings_of_its_own_in_prefills(self):
        decode, prefill = (Point(shape=LLAMA_3, context=4096, chunk=chunk) for chunk in (1, 2048))
        assert timing.layer_bytes(decode, 1, 1) == timing.layer_bytes(decode, 1)
        more = timing.layer_bytes(prefill, 1, 1) - timing.layer_bytes(prefill, 1)
        rings = 1.5 * 336 * 8 * 512  # half of the heads of four sparsities' layers, 21 blocks
        assert more == 4 * 2048 * 2 * 32 * 128 + rings


def test_turns_are_as_many_as_there_is_time():
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


def test_spread():
    found = timing.spread([4.0, 1.0, 2.0, 3.0, 10.0])
    assert found == {
        "median_ms": 3.0,
        "p25_ms": 2.0,
        "p75_ms": 4.0,
        "min_ms": 1.0,
        "max_ms": 10.0,
        "rounds": 5,
    }
