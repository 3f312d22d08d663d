"""The caches that the GPU benchmark makes for a step."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.layer import DuoStep, Layer
from tests.benchmarks.gpu.toys import CPU, TOY, toy
from tests.ops.triton_cases import implementation  # noqa: F401 - a fixture
from vllm_duo.ops.layer.triton import attend_and_write


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
