"""The arithmetic of both head classes' memory: worked examples, refusals, properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kv_cache.layouts import lengths, plans, shape_of, token_bytes
from tests.published import published_layout
from vllm_duo.heads.discovery import list_shipped
from vllm_duo.kv_cache.capacity import Capacity
from vllm_duo.kv_cache.formats import FORMATS, row_bytes
from vllm_duo.kv_cache.layout import KVShape, plan_layout
from vllm_duo.kv_cache.span import ANY_LENGTH, StreamingSpan
from vllm_duo.model_facts import HEAD_SIZES


class TestWorkedExamples:
    def test_blocks_of_llama_3_1_8b_at_half_sparsity(self):
        layout = published_layout("Meta-Llama-3.1-8B-Instruct")
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
        assert (
            Capacity.of_bytes(layout, 1001 * layout.block_bytes).concurrent_requests(160) == 100.0
        )

    def test_full_attention_pages_every_head(self):
        layout = plan_layout(shape_of([1], [3]), block_size=16, sink_size=16, recent_size=16)
        assert layout.full_attention_bytes(17) == 2 * 16 * 4 * (2 * 16 * 4)

    def test_needed_bytes(self):
        shape = KVShape(retrieval_heads=(3,), streaming_heads=(5,), head_size=128, dtype_bytes=2)
        layout = plan_layout(shape, block_size=16, sink_size=64, recent_size=256)
        assert layout.needed_bytes(1000) == 2_355_200

    def test_a_draft_models_layers_are_paged(self):
        """2 retrieval heads of 128 bytes a token, and a draft model of 96: 352 bytes each."""
        shape = shape_of([1, 1], [3, 3], drafts=96)
        layout = plan_layout(shape, block_size=16, sink_size=16, recent_size=16, draft_size=3)
        assert shape.paged_token_bytes == 352
        # 6 streaming heads of 128 bytes: 7 tokens of them in a block, so 35 slots are 5 blocks.
        assert layout.block_bytes == 352 * 16
        assert (layout.span.block_size, layout.blocks(160)) == (7, 10 + 5)
        assert layout.needed_bytes(160) == 352 * 160 + 6 * 128 * 32
        assert layout.full_attention_bytes(160) == (352 + 6 * 128) * 160

    def test_rest_of_a_full_run_is_waste_but_not_of_a_growing_one(self):
        layout = plan_layout(shape_of([1], [1]), block_size=16, sink_size=16, recent_size=24)
        assert layout.span.block_size == 16
        assert layout.waste(64) == pytest.approx(8 / (64 + 48))
        assert layout.waste(33) == 0.0

    def test_nothing_held_is_nothing_wasted(self):
        layout = plan_layout(shape_of([1], [1]), block_size=16, sink_size=16, recent_size=16)
        assert (layout.held_bytes(0), layout.waste(0)) == (0, 0.0)

    def test_longest_request_of_a_pool(self):
        layout = plan_layout(shape_of([1], [1]), block_size=16, sink_size=16, recent_size=16)
        assert layout.max_request_tokens(7) == 64
        assert layout.full_attention.max_request_tokens(7) == 96

    def test_number_of_bins_is_what_keeps_short_requests_small(self):
        layout = plan_layout(shape_of([64], [0]), block_size=16, sink_size=64, recent_size=256)
        assert layout.block_bytes == 1024 * layout.shape.token_bytes
        layout = plan_layout(
            shape_of([64] + [0] * 24, [0] + [8] * 24),
            block_size=16,
            sink_size=64,
            recent_size=256,
        )
        assert (len(layout.bins), layout.span.block_size, layout.blocks(320)) == (3, 16, 20 + 60)

    def test_worked_example_of_two_requests(self):
        layout = replace(
            plan_layout(shape_of([1], [1]), block_size=16, sink_size=16, recent_size=24),
            span=StreamingSpan(sink_size=16, recent_size=24, block_size=16),
            block_bytes=16 * 2 * 16 * 4,
        )
        assert layout.pool_waste([64, 33]) == pytest.approx(8 / (112 + 96 - 30))
        assert layout.pool_waste([]) == layout.pool_waste([0]) == 0.0


class TestRefusals:
    def test_no_heads(self):
        with pytest.raises(ValueError, match="expected at least one KV head, got none"):
            plan_layout(shape_of([0], [0]), block_size=16, sink_size=4, recent_size=4)

    def test_no_ranks(self):
        with pytest.raises(ValueError, match=r"one shape per rank.*got 0 ranks"):
            plan_layout([], block_size=16, sink_size=4, recent_size=4)

    def test_ranks_of_different_models(self):
        with pytest.raises(ValueError, match=r"one shape per rank.*use KVShape.split"):
            plan_layout(
                [shape_of([1], [1]), shape_of([1, 1], [1, 1])],
                block_size=16,
                sink_size=4,
                recent_size=4,
            )

    @pytest.mark.parametrize("sizes", [{"block_size": 0}, {"reference_tokens": 0}])
    def test_impossible_plan(self, sizes):
        with pytest.raises(ValueError, match="at least 1 token"):
            plan_layout(
                shape_of([1], [1]), **{"block_size": 16, **sizes}, sink_size=4, recent_size=4
            )

    def test_several_ranks_have_no_single_shape(self):
        layout = published_layout(list_shipped()[0], block_size=16, ranks=2)
        with pytest.raises(ValueError, match=r"2 ranks, expected one: name it"):
            _ = layout.shape

    def test_layer_without_streaming_heads_has_no_bin(self):
        layout = plan_layout(shape_of([1, 2], [1, 0]), block_size=16, sink_size=4, recent_size=4)
        with pytest.raises(KeyError, match="layer 1 has no streaming heads"):
            layout.bin_of(1)


class TestStreamingHeadsInTheModelsDtype:
    """Beside retrieval heads of fewer bytes."""

    @pytest.mark.parametrize(("quantised", "blocks"), [(True, 256 + 3), (False, 256 + 10)])
    def test_llama_3_1_8b_with_four_bits(self, quantised, blocks):
        """R = S = 128, D 128: a head's token has 136 bytes, in bf16 512, so a block has 34 such."""
        (shape,) = KVShape.split(
            [[True] * 4 + [False] * 4] * 32,
            head_size=128,
            dtype_bytes=2,
            row_bytes=136,
            streaming_quantised=quantised,
        )
        layout = plan_layout(shape, block_size=128, sink_size=64, recent_size=256)
        assert layout.block_bytes == 128 * 128 * 136
        assert layout.span.block_size == (128 if quantised else 34)
        assert (layout.blocks(32_768), len(layout.bins)) == (blocks, 1)
        # Stock keeps everything in four bits.
        assert layout.full_attention.block_bytes == 2 * layout.block_bytes

    def test_needed_bytes(self):
        shape = replace(shape_of([3], [5], row_bytes=136), head_size=128, dtype_bytes=2)
        layout = plan_layout(shape, block_size=16, sink_size=64, recent_size=256)
        assert layout.needed_bytes(1000) == 1_227_200
        assert layout.constant_bytes(shape) == 5 * 320 * 512

    def test_an_unquantised_cache_is_the_same_either_way(self):
        sizes = {"block_size": 16, "sink_size": 64, "recent_size": 256}
        one, other = (
            plan_layout(replace(shape_of([3], [5]), streaming_quantised=each), **sizes)
            for each in (True, False)
        )
        assert (one.block_bytes, one.span, one.bins) == (other.block_bytes, other.span, other.bins)

    @given(
        plans,
        st.sampled_from(HEAD_SIZES),
        st.sampled_from(sorted(FORMATS)),
    )
    def test_every_cache_is_aligned_to_its_numbers(self, layout, head_size, name):
        """So that a view of the pool in the model's dtype exists, whatever the format beside it."""
        shape = replace(
            layout.shape,
            head_size=head_size,
            row_bytes=row_bytes(name, head_size),
            streaming_quantised=False,
            draft_token_bytes=0,
        )
        for sizes in token_bytes(shape):
            assert [size % shape.dtype_bytes for size in sizes] == [0, 0]
        layout = plan_layout(shape, block_size=layout.block_size, sink_size=20, recent_size=75)
        assert layout.block_bytes % shape.dtype_bytes == 0


class TestLayersThatAreSkipped:
    """Those of both classes that keep the model's dtype, beside quantised ones."""

    def test_bytes_of_both_classes(self):
        """Two layers with R = 1 and S = 3, D 128: a head's token has 136 bytes, in bf16 512.

        16 tokens of both retrieval heads are 16 * 648 bytes. 3 heads of each class are 408 and 1,536
        bytes a token, so 5 tokens of both layers fill a block (9,720 of 10,368), and 32 are 7 blocks.
        """
        shape = KVShape(
            retrieval_heads=(1, 1),
            streaming_heads=(3, 3),
            head_size=128,
            dtype_bytes=2,
            row_bytes=136,
            skipped_layers=frozenset({1}),
        )
        assert (shape.paged_token_bytes, shape.ring_token_bytes) == (648, 1944)
        assert (shape.streaming_unit, shape.streaming_units) == (8, (51, 192))
        layout = plan_layout(shape, block_size=16, sink_size=16, recent_size=16)
        assert layout.bins == ((0, 1),)
        assert (layout.block_bytes, layout.span.block_size) == (16 * 648, 5)
        assert layout.blocks(160) == 10 + 7
        assert layout.needed_bytes(160) == 160 * 648 + 32 * 1944
        assert layout.constant_bytes(shape) == 32 * 1944
        assert layout.full_attention_bytes(160) == 160 * 4 * 648

    @settings(deadline=None)
    @given(plans)
    def test_all_layers_skipped_is_a_cache_that_is_not_quantised(self, layout):
        shape, span = layout.shape, layout.span
        sizes = {
            "block_size": layout.block_size,
            "sink_size": span.sink_size,
            "recent_size": span.recent_size,
        }
        skipped = replace(shape, skipped_layers=frozenset(range(len(shape.retrieval_heads))))
        plain = replace(shape, skipped_layers=frozenset(), row_bytes=None)
        one, other = (plan_layout(each, **sizes) for each in (skipped, plain))
        assert one.held_bytes(5000) == other.held_bytes(5000)
        assert (one.bins, one.span) == (other.bins, other.span)


class TestLayoutProperties:
    @given(plans)
    def test_bins_partition_the_streaming_layers(self, layout):
        binned = sorted(layer for layers in layout.bins for layer in layers)
        heads = layout.shape.streaming_heads
        assert binned == [layer for layer, streaming in enumerate(heads) if streaming]
        assert all(layer in layout.bins[layout.bin_of(layer)] for layer in binned)

    @given(plans)
    def test_no_group_is_wider_than_a_block(self, layout):
        sizes, span = token_bytes(layout.shape), layout.span
        paged = sum(retrieval for retrieval, _ in sizes) + layout.shape.draft_token_bytes
        groups = [paged * layout.block_size]
        for layers in layout.bins:
            groups.append(sum(sizes[layer][1] for layer in layers) * span.block_size)
        assert max(groups) <= layout.block_bytes

    @given(plans, lengths)
    def test_needed_bytes_are_the_visible_keys_and_values(self, layout, num_tokens):
        span, shape = layout.span, layout.shape
        # The rule, for the last query of the request.
        seen = sum(
            position < span.sink_size or position > num_tokens - 1 - span.recent_size
            for position in range(num_tokens)
        )
        sizes = token_bytes(shape)
        needed = sum(retrieval * num_tokens + streaming * seen for retrieval, streaming in sizes)
        drafts = shape.draft_token_bytes * num_tokens
        assert layout.needed_bytes(num_tokens) == needed + drafts

    @given(plans, lengths)
    def test_held_bytes_cover_the_needed_ones(self, layout, num_tokens):
        assert layout.held_bytes(num_tokens) >= layout.needed_bytes(num_tokens)
        assert 0.0 <= layout.waste(num_tokens) < 1.0

    @given(plans, lengths, st.integers(1, 5))
    def test_equal_requests_waste_what_one_does(self, layout, num_tokens, requests):
        assert layout.pool_waste([num_tokens] * requests) == pytest.approx(layout.waste(num_tokens))

    @given(plans, lengths, lengths)
    def test_two_requests_waste_no_more_than_the_worse_of_them(self, layout, one, other):
        wastes = layout.waste(one), layout.waste(other)
        assert min(wastes) - 1e-9 <= layout.pool_waste([one, other]) <= max(wastes) + 1e-9

    @given(plans, lengths, st.integers(0, 10**9))
    def test_that_many_requests_fit_the_pool(self, layout, num_tokens, pool_bytes):
        pool_bytes += layout.block_bytes
        fitting = int(Capacity.of_bytes(layout, pool_bytes).concurrent_requests(num_tokens))
        held = fitting * layout.held_bytes(num_tokens) + layout.block_bytes
        assert held <= pool_bytes < held + layout.held_bytes(num_tokens) + layout.block_bytes

    @given(plans, st.integers(0, 400))
    def test_longest_request_is_the_longest(self, layout, num_blocks):
        tokens = layout.max_request_tokens(num_blocks)
        if tokens == ANY_LENGTH:
            assert not layout.has_retrieval
            assert layout.blocks(10**9) <= num_blocks - 1
        else:
            assert layout.blocks(tokens) <= max(num_blocks - 1, 0) < layout.blocks(tokens + 1)

    @given(plans, lengths)
    def test_a_pool_of_what_a_request_holds_fits_one(self, layout, num_tokens):
        num_blocks = layout.blocks(num_tokens) + 1
        assert (
            Capacity.of_bytes(layout, num_blocks * layout.block_bytes).concurrent_requests(
                num_tokens
            )
            == 1.0
        )
        assert layout.num_blocks(num_blocks * layout.block_bytes) == num_blocks
        assert layout.max_request_tokens(num_blocks) >= num_tokens


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
            skipped_layers=frozenset(layer + (layer >= place) for layer in shape.skipped_layers),
        )
        assert held_bytes(longer) == held_bytes(shape)

    def test_a_rank_without_a_class_has_the_groups_of_the_others(self):
        ranks = KVShape.split(
            [[True, False]] * 2, head_size=16, dtype_bytes=2, tensor_parallel_size=2
        )
        layout = plan_layout(ranks, block_size=16, sink_size=16, recent_size=16)
        assert layout.has_retrieval
        assert (layout.bins, layout.num_groups) == (((0, 1),), 2)
        assert layout.block_bytes == 2 * 16 * 2 * 16 * 2
