"""KV heads by rank and class."""

from __future__ import annotations

import pytest

from tests.kv_cache.layouts import shape_of
from vllm_duo.kv_cache.shape import KVShape


class TestSplit:
    def test_heads_stay_where_vllm_puts_them(self):
        first, second = KVShape.split(
            [[True, False, False, False], [True, True, False, True]],
            head_size=16,
            dtype_bytes=2,
            tensor_parallel_size=2,
        )
        assert (first.retrieval_heads, first.streaming_heads) == ((1, 2), (1, 0))
        assert (second.retrieval_heads, second.streaming_heads) == ((0, 1), (2, 1))

    def test_more_ranks_than_heads_copy_them(self):
        shapes = KVShape.split(
            [[True, False, False, False]], head_size=16, dtype_bytes=2, tensor_parallel_size=8
        )
        assert [shape.retrieval_heads for shape in shapes] == [(1,)] * 2 + [(0,)] * 6
        assert [shape.streaming_heads for shape in shapes] == [(0,)] * 2 + [(1,)] * 6


def test_all_heads_are_paged_but_those_of_layers_that_slide():
    shape = shape_of([1, 0, 2], [3, 4, 2]).paged([False, True, False])
    assert (shape.retrieval_heads, shape.streaming_heads) == ((4, 0, 4), (0, 4, 0))


class TestRefusals:
    def test_classes_of_another_number_of_layers(self):
        with pytest.raises(ValueError, match="2 layers and streaming_heads 1"):
            shape_of([1, 1], [1])

    @pytest.mark.parametrize("ranks", [0, 3, 6])
    def test_heads_that_cannot_be_split(self, ranks):
        with pytest.raises(ValueError, match=f"4 KV heads cannot be split over {ranks} ranks"):
            KVShape.split([[True] * 4], head_size=16, dtype_bytes=2, tensor_parallel_size=ranks)

    def test_ragged_mask(self):
        with pytest.raises(ValueError, match=r"as many KV heads in every layer, got \[1, 2\]"):
            KVShape.split([[True], [True, False]], head_size=16, dtype_bytes=2)
