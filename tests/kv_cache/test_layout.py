"""The arithmetic of both head classes' memory: worked examples, properties, shipped patterns."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_duo.heads import HeadPattern
from vllm_duo.heads.discovery import PUBLISHED, list_shipped
from vllm_duo.kv_cache.layout import (
    KVShape,
    Layout,
    StreamingSpan,
    cdiv,
    pack_bins,
    plan_layout,
    streaming_block_sizes,
)

SPAN = StreamingSpan(sink_size=64, recent_size=256, block_size=16)

spans = st.builds(
    StreamingSpan,
    sink_size=st.integers(0, 70),
    recent_size=st.integers(1, 300),
    draft_size=st.integers(0, 8),
    block_size=st.integers(1, 65),
)
lengths = st.integers(1, 5000)
shapes = st.builds(
    lambda heads, head_size, dtype_bytes: KVShape(
        retrieval_heads=tuple(retrieval for retrieval, _ in heads),
        streaming_heads=tuple(streaming for _, streaming in heads),
        head_size=head_size,
        dtype_bytes=dtype_bytes,
    ),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)).filter(any), min_size=1, max_size=12),
    st.sampled_from([16, 128]),
    st.sampled_from([2, 4]),
)
plans = st.builds(
    plan_layout,
    shapes,
    block_size=st.sampled_from([1, 8, 16, 48, 128]),
    sink_size=st.integers(0, 70),
    recent_size=st.integers(1, 300),
    draft_size=st.integers(0, 8),
    reference_tokens=st.sampled_from([1, 300, 4096, 32_768]),
)


def shape_of(retrieval: list[int], streaming: list[int]) -> KVShape:
    return KVShape(
        retrieval_heads=tuple(retrieval),
        streaming_heads=tuple(streaming),
        head_size=16,
        dtype_bytes=4,
    )


def shipped_layout(name: str, sparsity: float, block_size: int) -> Layout:
    mask = HeadPattern.load(PUBLISHED / name).select(sparsity=sparsity).retrieval
    shape = KVShape(
        retrieval_heads=tuple(map(int, mask.sum(axis=1))),
        streaming_heads=tuple(map(int, (~mask).sum(axis=1))),
        head_size=128,
        dtype_bytes=2,
    )
    return plan_layout(shape, block_size=block_size, sink_size=64, recent_size=256)


class TestWorkedExamples:
    @pytest.mark.parametrize(
        ("num_tokens", "blocks"), [(0, 0), (10, 1), (64, 4), (65, 5), (320, 20), (1_000_000, 20)]
    )
    def test_blocks_of_a_span(self, num_tokens, blocks):
        assert SPAN.blocks(num_tokens) == blocks

    def test_most_blocks_of_a_span(self):
        assert SPAN.max_blocks == 20

    def test_drafts_lengthen_the_ring(self):
        span = replace(SPAN, draft_size=1)
        assert (span.ring_size, span.max_blocks) == (257, 4 + 17)

    @pytest.mark.parametrize(("num_tokens", "kept"), [(100, 100), (1000, 320)])
    def test_kept_tokens(self, num_tokens, kept):
        assert SPAN.kept_tokens(num_tokens) == kept

    def test_blocks_of_llama_3_1_8b_at_half_sparsity(self):
        layout = shipped_layout("Meta-Llama-3.1-8B-Instruct", 0.5, 128)
        assert (layout.span.block_size, len(layout.bins)) == (128, 1)
        assert layout.blocks(32_768) == 256 + 3

    def test_nothing_is_wasted_where_the_widths_meet(self):
        layout = plan_layout(shape_of([1], [1]), block_size=16, sink_size=16, recent_size=16)
        assert (layout.blocks(64), layout.waste(64)) == (4 + 2, 0.0)

    def test_the_last_retrieval_block_is_no_waste(self):
        layout = plan_layout(shape_of([1], [1]), block_size=16, sink_size=16, recent_size=16)
        assert layout.waste(65) == 0.0

    def test_one_block_of_the_pool_is_vllms(self):
        layout = plan_layout(shape_of([1], [0]), block_size=16, sink_size=16, recent_size=16)
        assert layout.blocks(160) == 10
        assert layout.concurrent_requests(1001 * layout.block_bytes, 160) == 100.0

    def test_full_attention_pages_every_head(self):
        layout = plan_layout(shape_of([1], [3]), block_size=16, sink_size=16, recent_size=16)
        assert layout.full_attention_bytes(17) == 2 * 16 * 4 * (2 * 16 * 4)

    def test_bins_are_packed_first_fit_decreasing(self):
        assert pack_bins((3, 0, 2, 1, 2), 4) == ((0, 3), (2, 4))

    @pytest.mark.parametrize(
        ("block_size", "sizes"), [(128, [128, 64, 32, 16, 8]), (48, [48, 24, 16, 12, 8]), (4, [4])]
    )
    def test_candidates_for_the_streaming_block(self, block_size, sizes):
        assert list(streaming_block_sizes(block_size)) == sizes


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "value"),
        [("sink_size", -1), ("recent_size", 0), ("block_size", 0), ("draft_size", -1)],
    )
    def test_impossible_span(self, name, value):
        with pytest.raises(ValueError, match=f"{name} must be at least {value + 1} tokens, got"):
            replace(SPAN, **{name: value})

    def test_classes_of_another_number_of_layers(self):
        with pytest.raises(ValueError, match="2 layers and streaming_heads 1"):
            shape_of([1, 1], [1])

    def test_layer_without_streaming_heads_has_no_bin(self):
        layout = plan_layout(shape_of([1, 2], [1, 0]), block_size=16, sink_size=4, recent_size=4)
        with pytest.raises(KeyError, match="layer 1 has no streaming heads"):
            layout.bin_of(1)


class TestSpanProperties:
    @given(spans, st.integers(0, 5000))
    def test_a_longer_request_never_holds_less(self, span, num_tokens):
        assert span.blocks(num_tokens) <= span.blocks(num_tokens + 1) <= span.max_blocks

    @given(spans)
    def test_every_block_is_claimed_in_the_end(self, span):
        assert span.blocks(span.sink_size + span.ring_size) == span.max_blocks

    @given(spans, lengths)
    def test_at_most_one_block_more_than_stock(self, span, num_tokens):
        assert span.blocks(num_tokens) <= cdiv(num_tokens, span.block_size) + 1

    @given(spans, lengths)
    def test_the_blocks_have_room_for_what_is_kept(self, span, num_tokens):
        assert span.blocks(num_tokens) * span.block_size >= span.kept_tokens(num_tokens)


class TestLayoutProperties:
    @given(plans)
    def test_bins_partition_the_streaming_layers(self, layout):
        binned = sorted(layer for layers in layout.bins for layer in layers)
        heads = layout.shape.streaming_heads
        assert binned == [layer for layer, streaming in enumerate(heads) if streaming]
        assert all(layer in layout.bins[layout.bin_of(layer)] for layer in binned)

    @given(plans)
    def test_no_group_is_wider_than_a_block(self, layout):
        token, span = layout.shape.token_bytes, layout.span
        groups = [sum(layout.shape.retrieval_heads) * layout.block_size * token]
        for layers in layout.bins:
            heads = sum(layout.shape.streaming_heads[layer] for layer in layers)
            groups.append(heads * span.block_size * token)
        assert max(groups) <= layout.block_bytes

    @given(plans, lengths)
    def test_needed_bytes_are_the_visible_keys_and_values(self, layout, num_tokens):
        span, shape = layout.span, layout.shape
        # The rule, for the last query of the request.
        seen = sum(
            position < span.sink_size or position > num_tokens - 1 - span.recent_size
            for position in range(num_tokens)
        )
        needed = sum(shape.retrieval_heads) * num_tokens + sum(shape.streaming_heads) * seen
        assert layout.needed_bytes(num_tokens) == needed * 2 * shape.head_size * shape.dtype_bytes

    @given(plans, lengths)
    def test_held_bytes_cover_the_needed_ones(self, layout, num_tokens):
        assert layout.held_bytes(num_tokens) >= layout.needed_bytes(num_tokens)
        assert 0.0 <= layout.waste(num_tokens) < 1.0

    @given(plans, lengths, st.integers(0, 10**9))
    def test_that_many_requests_fit_the_pool(self, layout, num_tokens, pool_bytes):
        pool_bytes += layout.block_bytes
        fitting = int(layout.concurrent_requests(pool_bytes, num_tokens))
        held = fitting * layout.held_bytes(num_tokens) + layout.block_bytes
        assert held <= pool_bytes < held + layout.held_bytes(num_tokens) + layout.block_bytes

    @settings(max_examples=50)
    @given(
        shapes,
        st.sampled_from([8, 16, 48]),
        st.integers(0, 70),
        st.integers(1, 300),
        st.sampled_from([64, 4096]),
    )
    def test_the_choice_is_the_best_of_all_candidates(
        self, shape, block_size, sink_size, recent_size, num_tokens
    ):
        chosen = plan_layout(
            shape,
            block_size=block_size,
            sink_size=sink_size,
            recent_size=recent_size,
            reference_tokens=num_tokens,
        )
        retrieval, streaming = sum(shape.retrieval_heads), shape.streaming_heads
        held = {}
        for size in (size for size in range(8, block_size + 1) if block_size % size == 0):
            # In units of one head's token; without retrieval heads one bin takes all layers.
            width = max(retrieval * block_size, max(streaming) * size)
            if not retrieval:
                width = sum(streaming) * size
            bins = len(pack_bins([heads * size for heads in streaming], width))
            recent = min(max(num_tokens - sink_size, 0), recent_size)
            blocks = cdiv(min(num_tokens, sink_size), size) + cdiv(recent, size)
            paged = cdiv(num_tokens, block_size) if retrieval else 0
            held[size] = (paged + bins * blocks) * width * shape.token_bytes
        least = min(held.values())
        assert chosen.held_bytes(num_tokens) == least
        assert chosen.span.block_size == max(size for size in held if held[size] == least)


class TestLayersOfOneClass:
    def test_no_streaming_head_anywhere_costs_what_stock_costs(self):
        layout = plan_layout(shape_of([2, 2], [0, 0]), block_size=16, sink_size=4, recent_size=4)
        assert layout.bins == ()
        assert layout.held_bytes(100) == layout.full_attention_bytes(100)

    def test_no_retrieval_head_anywhere_is_constant(self):
        layout = plan_layout(shape_of([0, 0], [2, 2]), block_size=16, sink_size=64, recent_size=256)
        assert len(layout.bins) == 1
        assert layout.blocks(320) == layout.blocks(1_000_000) == layout.span.max_blocks

    def test_an_exclusive_pattern_pays_for_one_class_a_layer(self):
        layout = plan_layout(
            shape_of([4, 0, 4, 0], [0, 4, 0, 4]), block_size=16, sink_size=16, recent_size=16
        )
        assert layout.bins == ((1, 3),)
        assert layout.block_bytes == 2 * 4 * 16 * layout.shape.token_bytes
        assert (layout.blocks(1600), layout.waste(1600)) == (100 + 2, 0.0)

    @given(plans, st.integers(0, 12), lengths)
    def test_a_layer_without_heads_changes_nothing(self, layout, place, num_tokens):
        def with_empty_layer(heads):
            return (*heads[:place], 0, *heads[place:])

        def held_bytes(shape):
            span = layout.span
            return plan_layout(
                shape,
                block_size=layout.block_size,
                sink_size=span.sink_size,
                recent_size=span.recent_size,
                draft_size=span.draft_size,
            ).held_bytes(num_tokens)

        shape = layout.shape
        longer = replace(
            shape,
            retrieval_heads=with_empty_layer(shape.retrieval_heads),
            streaming_heads=with_empty_layer(shape.streaming_heads),
        )
        assert held_bytes(longer) == held_bytes(shape)


# The design's target is a waste of at most 3 % at 4k tokens and 1 % at 32k and 128k. The latter is
# met everywhere. At 4k only half sparsity meets its target: at a quarter the streaming group fills
# a third of a block; at three quarters and blocks of 16 first-fit decreasing opens four bins where
# the heads fit three exactly, and at 128 no divisor's blocks meet the ring's size.
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize(("sparsity", "at_4k"), [(0.25, 0.062), (0.5, 0.015), (0.75, 0.06)])
@pytest.mark.parametrize("name", list_shipped())
def test_waste_on_a_shipped_pattern(name, sparsity, at_4k, block_size):
    layout = shipped_layout(name, sparsity, block_size)
    assert layout.waste(4096) <= at_4k
    assert layout.waste(32_768) <= 0.01
    assert layout.waste(131_072) <= 0.0025
