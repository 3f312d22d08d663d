"""The arithmetic of both head classes' memory: worked examples, properties, shipped patterns."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from math import inf

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from vllm_duo.heads import HeadPattern
from vllm_duo.heads.discovery import PUBLISHED, list_shipped
from vllm_duo.kv_cache.capacity import Capacity
from vllm_duo.kv_cache.layout import (
    ANY_LENGTH,
    HELD_TOLERANCE,
    KVShape,
    Layout,
    StreamingSpan,
    cdiv,
    plan_layout,
)
from vllm_duo.kv_cache.packing import (
    fit_bins,
    narrowest_bins,
    pack_bins,
    spread_ranks,
    subset_sums,
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
    lambda heads, head_size, dtype_bytes, draft_token_bytes: KVShape(
        retrieval_heads=tuple(retrieval for retrieval, _ in heads),
        streaming_heads=tuple(streaming for _, streaming in heads),
        head_size=head_size,
        dtype_bytes=dtype_bytes,
        draft_token_bytes=draft_token_bytes,
    ),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)).filter(any), min_size=1, max_size=12),
    st.sampled_from([16, 128]),
    st.sampled_from([2, 4]),
    # A draft model's heads need not be as wide as the others.
    st.sampled_from([0, 0, 96, 1536]),
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


def shape_of(retrieval: list[int], streaming: list[int], drafts: int = 0) -> KVShape:
    return KVShape(
        retrieval_heads=tuple(retrieval),
        streaming_heads=tuple(streaming),
        head_size=16,
        dtype_bytes=4,
        draft_token_bytes=drafts,
    )


def shipped_layout(
    name: str,
    sparsity: float,
    block_size: int,
    *,
    tensor_parallel_size: int = 1,
    balance: bool = False,
) -> Layout:
    selection = HeadPattern.load(PUBLISHED / name).select(
        sparsity=sparsity, balance_ranks=tensor_parallel_size if balance else 1
    )
    ranks = KVShape.split(
        selection.retrieval,
        head_size=128,
        dtype_bytes=2,
        tensor_parallel_size=tensor_parallel_size,
    )
    return plan_layout(ranks, block_size=block_size, sink_size=64, recent_size=256)


def is_within_stock(layout: Layout, num_tokens: int) -> bool:
    """At most what stock vLLM holds and one block a group."""
    allowed = layout.full_attention_bytes(num_tokens) + layout.num_groups * layout.block_bytes
    return layout.held_bytes(num_tokens) <= allowed


def partitions(layers: list[int]):
    """All ways of putting layers into bins."""
    if not layers:
        yield []
        return
    first, rest = layers[0], layers[1:]
    for bins in partitions(rest):
        yield [[first], *bins]
        for place in range(len(bins)):
            yield [*bins[:place], [first, *bins[place]], *bins[place + 1 :]]


def all_layouts(like: Layout):
    """Every layout of the same heads and sizes: each partition, ``P_s`` and tightest block."""
    shape = like.shape
    for bins in partitions([at for at, heads in enumerate(shape.streaming_heads) if heads]):
        width = max((sum(shape.streaming_heads[at] for at in layers) for layers in bins), default=0)
        for size in range(1, like.span.slots + 1):
            paged = shape.paged_token_bytes * like.block_size
            yield replace(
                like,
                bins=tuple(map(tuple, bins)),
                span=replace(like.span, block_size=size),
                block_bytes=max(paged, width * size * shape.token_bytes),
            )


few_layers = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 8)).filter(any), min_size=1, max_size=4
).filter(lambda heads: any(r for r, _ in heads) and any(s for _, s in heads))
small_plans = st.builds(
    lambda heads, drafts, block_size, sink_size, recent_size, reference_tokens: plan_layout(
        shape_of([r for r, _ in heads], [s for _, s in heads], drafts),
        block_size=block_size,
        sink_size=sink_size,
        recent_size=recent_size,
        reference_tokens=reference_tokens,
    ),
    few_layers,
    st.sampled_from([0, 0, 96, 1536]),
    st.sampled_from([1, 3, 8, 16]),
    st.integers(0, 9),
    st.integers(1, 20),
    st.sampled_from([5, 64, 32_768]),
)


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
        assert (span.ring_size, span.slots, span.max_blocks) == (257, 321, 21)

    @pytest.mark.parametrize(("block_size", "blocks"), [(48, 7), (128, 3), (320, 1)])
    def test_blocks_do_not_care_where_the_sink_ends(self, block_size, blocks):
        assert replace(SPAN, block_size=block_size).max_blocks == blocks

    @pytest.mark.parametrize(
        ("position", "slot"), [(0, 0), (63, 63), (64, 64), (319, 319), (320, 64), (576, 64)]
    )
    def test_slots_of_a_run(self, position, slot):
        assert SPAN.slot(position) == slot

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

    @pytest.mark.parametrize("ranks", [0, 3, 6])
    def test_heads_that_cannot_be_split(self, ranks):
        with pytest.raises(ValueError, match=f"4 KV heads cannot be split over {ranks} ranks"):
            KVShape.split([[True] * 4], head_size=16, dtype_bytes=2, tensor_parallel_size=ranks)

    def test_ragged_mask(self):
        with pytest.raises(ValueError, match=r"as many KV heads in every layer, got \[1, 2\]"):
            KVShape.split([[True], [True, False]], head_size=16, dtype_bytes=2)

    def test_several_ranks_have_no_single_shape(self):
        layout = shipped_layout(list_shipped()[0], 0.5, 16, tensor_parallel_size=2)
        with pytest.raises(ValueError, match=r"2 ranks, expected one: name it"):
            _ = layout.shape

    def test_layer_wider_than_a_bin(self):
        with pytest.raises(ValueError, match="a layer is 5 heads wide, a bin holds 4"):
            pack_bins((5,), 4)

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
        assert span.blocks(span.slots) == span.max_blocks
        assert span.blocks(span.slots + 1 - span.block_size) >= span.max_blocks - 1

    @given(spans, lengths)
    def test_never_more_blocks_than_a_sink_and_a_ring_apart(self, span, num_tokens):
        sink = min(num_tokens, span.sink_size)
        ring = min(max(num_tokens - span.sink_size, 0), span.recent_size + span.draft_size)
        apart = cdiv(sink, span.block_size) + cdiv(ring, span.block_size)
        assert span.blocks(num_tokens) <= apart

    @given(spans, lengths)
    def test_never_more_blocks_than_stock(self, span, num_tokens):
        assert span.blocks(num_tokens) <= cdiv(num_tokens, span.block_size)

    @given(spans, lengths)
    def test_what_the_last_query_sees_is_in_slots_of_its_own(self, span, num_tokens):
        seen = [
            position
            for position in range(num_tokens)
            if position < span.sink_size or position > num_tokens - 1 - span.ring_size
        ]
        slots = {span.slot(position) for position in seen}
        assert len(slots) == len(seen)
        assert max(slots) < span.blocks(num_tokens) * span.block_size

    @given(spans, lengths)
    def test_the_blocks_have_room_for_what_is_kept(self, span, num_tokens):
        assert span.blocks(num_tokens) * span.block_size >= span.kept_tokens(num_tokens)


def test_worked_example_of_two_requests():
    layout = replace(
        plan_layout(shape_of([1], [1]), block_size=16, sink_size=16, recent_size=24),
        span=StreamingSpan(sink_size=16, recent_size=24, block_size=16),
        block_bytes=16 * 2 * 16 * 4,
    )
    assert layout.pool_waste([64, 33]) == pytest.approx(8 / (112 + 96 - 30))
    assert layout.pool_waste([]) == layout.pool_waste([0]) == 0.0


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
        paged = sum(layout.shape.retrieval_heads) * token + layout.shape.draft_token_bytes
        groups = [paged * layout.block_size]
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
        drafts = shape.draft_token_bytes * num_tokens
        needed *= 2 * shape.head_size * shape.dtype_bytes
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

    @given(plans)
    def test_the_plan_is_the_same_in_every_process(self, layout):
        span = layout.span
        again = plan_layout(
            layout.ranks,
            block_size=layout.block_size,
            sink_size=span.sink_size,
            recent_size=span.recent_size,
            draft_size=span.draft_size,
        )
        assert again == plan_layout(
            layout.ranks[0],
            block_size=layout.block_size,
            sink_size=span.sink_size,
            recent_size=span.recent_size,
            draft_size=span.draft_size,
        )

    # Four equal layers: three bins are as wide as two of them, and four are narrower.
    @example(
        plan_layout(shape_of([0, 0, 0, 1], [2, 2, 2, 2]), block_size=1, sink_size=0, recent_size=5),
        5,
    )
    @settings(max_examples=60, deadline=None)
    @given(small_plans, st.sampled_from([5, 64, 32_768]))
    def test_no_other_layout_keeps_within_stock_or_holds_less(self, layout, num_tokens):
        layout = plan_layout(
            layout.shape,
            block_size=layout.block_size,
            sink_size=layout.span.sink_size,
            recent_size=layout.span.recent_size,
            reference_tokens=num_tokens,
        )
        lengths = [*range(1, 31), 47, 48, 49, 1000, 100_000]
        candidates = list(all_layouts(layout))
        within = [other for other in candidates if all(is_within_stock(other, n) for n in lengths)]
        if within:
            assert all(is_within_stock(layout, n) for n in lengths)
        least = min(other.held_bytes(num_tokens) for other in within or candidates)
        limit = least * (1 + HELD_TOLERANCE)
        assert layout.held_bytes(num_tokens) <= limit
        fewest = min(
            len(other.bins)
            for other in within or candidates
            if other.held_bytes(num_tokens) <= limit
        )
        assert len(layout.bins) == fewest

    @given(plans)
    def test_short_requests_hold_no_more_than_stock_and_a_block_a_group(self, layout):
        shape, slots = layout.shape, layout.span.slots
        assume(layout.has_retrieval and layout.bins)
        paged = shape.paged_token_bytes * layout.block_size
        size = paged // (shape.num_streaming * shape.token_bytes)
        assume(size * (size + 1) >= slots - 1)
        assert all(is_within_stock(layout, n) for n in range(1, slots + 50))
        assert is_within_stock(layout, 10**6)


class TestPacking:
    @settings(deadline=None)
    @given(st.lists(st.integers(0, 12), max_size=9), st.integers(12, 30))
    def test_bins_are_the_fewest(self, widths, capacity):
        bins = pack_bins(widths, capacity)
        layers = [at for at, width in enumerate(widths) if width]
        assert sorted(at for each in bins for at in each) == layers
        assert all(sum(widths[at] for at in each) <= capacity for each in bins)
        fewest = least_width_by_bins(widths)
        assert len(bins) == min(num for num, width in fewest.items() if width <= capacity)

    @settings(deadline=None)
    @given(st.lists(st.integers(0, 12), max_size=9).filter(any), st.integers(1, 10))
    def test_widest_bin_is_the_narrowest(self, widths, num_bins):
        bins = narrowest_bins(widths, num_bins)
        fewest = least_width_by_bins(widths)
        assert len(bins) <= num_bins
        assert max(sum(widths[at] for at in each) for each in bins) == min(
            width for num, width in fewest.items() if num <= num_bins
        )

    def test_first_fit_decreasing_would_need_a_bin_more(self):
        widths = (10, 8, 6, 5, 3, 2)
        assert pack_bins(widths, 17) == ((0, 3, 5), (1, 2, 4))
        loads: list[int] = []
        for width in widths:
            place = next((at for at, load in enumerate(loads) if load + width <= 17), len(loads))
            loads[place:] = [*(loads[place : place + 1] or [0]), *loads[place + 1 :]]
            loads[place] += width
        assert loads == [16, 16, 2]

    def test_worked_examples(self):
        assert narrowest_bins((3, 0, 2, 1, 2), 2) == ((0, 3), (2, 4))
        assert fit_bins((3, 0, 2, 1, 2), 4, 2) == ((0, 3), (2, 4))
        assert fit_bins((3, 0, 2, 1, 2), 4, 1) is None
        assert subset_sums((2, 3), 5) == 0b101101
        assert spread_ranks([(2, 0, 1, 1), (0, 2, 1, 1)], 2) == ((0, 1), (2, 3))

    def test_filling_bins_one_by_one_is_not_enough(self):
        # 8 fills up with 7 + 5, after which 6, 6, 4, 4 do not fit one bin; 8 + 6 + 6 leaves 7 5 4 4.
        bins = fit_bins((8, 7, 6, 6, 5, 4, 4), 20, 2)
        assert bins == ((0, 2, 3), (1, 4, 5, 6))

    @given(
        st.lists(st.lists(st.integers(0, 4), min_size=9, max_size=9), min_size=2, max_size=4),
        st.integers(1, 5),
    )
    def test_ranks_share_their_bins(self, ranks, num_bins):
        bins = spread_ranks(ranks, num_bins)
        assert len(bins) <= num_bins
        streaming = [at for at in range(9) if any(widths[at] for widths in ranks)]
        assert sorted(at for each in bins for at in each) == streaming


def least_width_by_bins(widths) -> dict[int, float]:
    """Oracle: width of the widest bin, by number of bins, over all partitions."""
    layers = [at for at, width in enumerate(widths) if width]
    least: dict[int, float] = {}
    for bins in partitions(layers) if len(layers) < 8 else merged(widths, layers):
        widest = max((sum(widths[at] for at in each) for each in bins), default=0)
        least[len(bins)] = min(least.get(len(bins), inf), widest)
    return least


def merged(widths, layers):
    """Like ``partitions``, without telling layers of one width apart."""
    seen = set()
    for bins in partitions(layers):
        key = tuple(sorted(tuple(sorted(widths[at] for at in each)) for each in bins))
        if key not in seen:
            seen.add(key)
            yield bins


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


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", list_shipped())
class TestShippedPatterns:
    """The design's targets, and the sizes at which it sets them."""

    def test_waste(self, name, sparsity, block_size):
        layout = shipped_layout(name, sparsity, block_size)
        assert layout.waste(4096) <= 0.03
        assert layout.waste(32_768) <= 0.01
        assert layout.waste(131_072) <= 0.01

    def test_few_bins(self, name, sparsity, block_size):
        layout = shipped_layout(name, sparsity, block_size)
        assert len(layout.bins) == (3 if (sparsity, block_size) == (0.75, 16) else 1)

    def test_every_length_holds_at_most_stock_and_a_block_a_group(self, name, sparsity, block_size):
        layout = shipped_layout(name, sparsity, block_size)
        assert all(is_within_stock(layout, num_tokens) for num_tokens in range(1, 2001))

    def test_small_sink_and_recent(self, name, sparsity, block_size):
        shape = shipped_layout(name, sparsity, block_size).shape
        layout = plan_layout(
            shape, block_size=block_size, sink_size=16, recent_size=64, reference_tokens=4096
        )
        assert layout.waste(4096) <= 0.03
        assert layout.waste(32_768) <= 0.01
        assert all(is_within_stock(layout, num_tokens) for num_tokens in range(1, 500))

    @pytest.mark.parametrize("ranks", [2, 4, 8])
    def test_a_balanced_split_serves_what_one_rank_serves(self, name, sparsity, block_size, ranks):
        split = shipped_layout(name, sparsity, block_size, tensor_parallel_size=ranks, balance=True)
        whole = shipped_layout(name, sparsity, block_size)
        gain = [
            layout.full_attention_bytes(32_768) / layout.held_bytes(32_768)
            for layout in (split, whole)
        ]
        if (sparsity, block_size) == (0.75, 16):
            # Three bins that fit every rank exactly are not always found, or there.
            assert gain[0] >= 0.965 * gain[1]
        else:
            assert gain[0] == gain[1]


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", list_shipped())
def test_ranks_cost_no_more_than_their_totals(name, ranks, block_size):
    layout = shipped_layout(name, 0.5, block_size, tensor_parallel_size=ranks)
    assert len(layout.ranks) == ranks
    assert len(layout.bins) == 1
    assert layout.needed_bytes(32_768) / layout.held_bytes(32_768) >= 0.95
    for rank in layout.ranks:
        token = rank.token_bytes
        assert rank.num_retrieval * block_size * token <= layout.block_bytes
        for layers in layout.bins:
            heads = sum(rank.streaming_heads[layer] for layer in layers)
            assert heads * layout.span.block_size * token <= layout.block_bytes


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

    def test_a_rank_without_a_class_has_the_groups_of_the_others(self):
        ranks = KVShape.split(
            [[True, False]] * 2, head_size=16, dtype_bytes=2, tensor_parallel_size=2
        )
        layout = plan_layout(ranks, block_size=16, sink_size=16, recent_size=16)
        assert layout.has_retrieval
        assert (layout.bins, layout.num_groups) == (((0, 1),), 2)
        assert layout.block_bytes == 2 * 16 * 2 * 16 * 2


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("block_size", [16, 128])
def test_planning_a_model_of_80_layers_is_quick(sparsity, block_size):
    heads = random.Random(0)
    mask = [[heads.random() >= sparsity for _ in range(8)] for _ in range(80)]
    shapes = KVShape.split(mask, head_size=128, dtype_bytes=2)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        plan_layout(shapes, block_size=block_size, sink_size=64, recent_size=256)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05


def joint_layouts(draw):
    """A model of a few layers, some with a window, in small blocks."""
    num_layers, heads = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    window = draw(st.integers(1, 90))
    windows = [window if draw(st.booleans()) else None for _ in range(num_layers)]
    retrieval = [0 if own else draw(st.integers(0, heads)) for own in windows]
    return plan_layout(
        KVShape(
            retrieval_heads=tuple(retrieval),
            streaming_heads=tuple(heads - n for n in retrieval),
            head_size=8,
            dtype_bytes=2,
        ),
        block_size=draw(st.sampled_from([1, 4, 16, 32])),
        sink_size=draw(st.integers(0, 20)),
        recent_size=draw(st.integers(1, 60)),
        draft_size=draw(st.sampled_from([0, 3])),
        windows=windows,
        reference_tokens=draw(st.sampled_from([64, 500, 4000])),
    )


class TestWindows:
    """Layers with a sliding window of the model's own, beside the pattern's streaming heads."""

    @settings(max_examples=300, deadline=None)
    @given(layout=st.composite(joint_layouts)())
    def test_every_head_has_one_bin_of_its_kind_that_fits_a_block(self, layout):
        streaming = [at for at, heads in enumerate(layout.shape.streaming_heads) if heads]
        assert sorted(layer for layers in layout.bins for layer in layers) == streaming
        token = layout.shape.token_bytes
        windows = layout.windows or [None] * len(layout.shape.streaming_heads)
        for layers, span in zip(layout.bins, layout.spans, strict=True):
            heads = sum(layout.shape.streaming_heads[layer] for layer in layers)
            assert heads * span.block_size * token <= layout.block_bytes
            kept = {
                (layout.span.sink_size, layout.span.recent_size)
                if windows[layer] is None
                else (0, windows[layer])
                for layer in layers
            }
            assert kept == {(span.sink_size, span.recent_size)}
        assert layout.shape.num_retrieval * layout.block_size * token <= layout.block_bytes

    @settings(max_examples=300, deadline=None)
    @given(layout=st.composite(joint_layouts)(), num_tokens=st.integers(1, 5000))
    def test_figures_agree_with_sums_by_head(self, layout, num_tokens):
        shape = layout.shape
        windows = layout.windows or [None] * len(shape.streaming_heads)
        sizes = layout.span.sink_size + layout.span.recent_size
        kept = sum(
            heads * min(num_tokens, sizes if window is None else window)
            for heads, window in zip(shape.streaming_heads, windows, strict=True)
        )
        needed = (shape.num_retrieval * num_tokens + kept) * shape.token_bytes
        assert layout.needed_bytes(num_tokens) == needed <= layout.held_bytes(num_tokens)
        assert 0 <= layout.waste(num_tokens) < 1
        constant = sum(
            heads * (sizes if window is None else window)
            for heads, window in zip(shape.streaming_heads, windows, strict=True)
        )
        assert layout.constant_bytes(shape) == constant * shape.token_bytes
        longest = layout.max_request_tokens(layout.blocks(num_tokens) + 1)
        assert longest >= num_tokens
        if longest != ANY_LENGTH:
            assert layout.blocks(longest + 1) > layout.blocks(num_tokens)

    @settings(max_examples=100, deadline=None)
    @given(layout=st.composite(joint_layouts)())
    def test_full_attention_keeps_the_windows(self, layout):
        full = layout.full_attention
        windows = layout.windows or [None] * len(layout.shape.streaming_heads)
        own = zip(full.shape.streaming_heads, full.shape.retrieval_heads, windows, strict=True)
        for streaming, retrieval, window in own:
            assert (streaming if window is None else retrieval) == 0
        assert full.needed_bytes(10_000) >= layout.needed_bytes(10_000)

    def test_worked_example_of_the_search(self):
        shape = KVShape(
            retrieval_heads=(0,) * 10 + (8,) * 2,
            streaming_heads=(16,) * 10 + (8,) * 2,
            head_size=128,
            dtype_bytes=2,
        )
        layout = plan_layout(
            shape,
            block_size=128,
            sink_size=64,
            recent_size=256,
            windows=(1024,) * 10 + (None,) * 2,
        )
        assert [(len(b), s.block_size) for b, s in zip(layout.bins, layout.spans, strict=True)] == [
            (5, 25),
            (5, 25),
            (2, 128),
        ]
        assert layout.block_bytes == 2048 * 512
        assert layout.blocks(32_768) == 256 + 2 * 41 + 3

    @pytest.mark.parametrize("num_tokens", [4096, 32_768, 131_072])
    @pytest.mark.parametrize(
        ("layers", "heads", "window", "every"),
        [(62, 16, 1024, 6), (48, 8, 1024, 6), (36, 8, 32_768, 4), (32, 32, 4096, 4)],
    )
    def test_waste_of_real_shapes(self, layers, heads, window, every, num_tokens):
        """The targets of the shipped patterns: 3 % at 4k tokens; 1.5 % beyond, with fewer bins."""
        windows = tuple(None if (at + 1) % every == 0 else window for at in range(layers))
        retrieval = tuple(0 if own else heads // 2 for own in windows)
        layout = plan_layout(
            KVShape(
                retrieval_heads=retrieval,
                streaming_heads=tuple(heads - n for n in retrieval),
                head_size=128,
                dtype_bytes=2,
            ),
            block_size=128,
            sink_size=64,
            recent_size=256,
            windows=windows,
        )
        assert layout.waste(num_tokens) <= (0.03 if num_tokens == 4096 else 0.015)
        assert len(layout.bins) <= 3

    def test_ranks_share_the_bins(self):
        """Two ranks with unequal retrieval heads: one block table, all bins wide enough for either."""
        windows = (40, None, 40, None)
        mask = [[False] * 4, [True, True, False, True], [False] * 4, [False, False, True, False]]
        ranks = KVShape.split(mask, head_size=8, dtype_bytes=2, tensor_parallel_size=2)
        layout = plan_layout(ranks, block_size=16, sink_size=4, recent_size=9, windows=windows)
        for rank in ranks:
            for layers, span in zip(layout.bins, layout.spans, strict=True):
                heads = sum(rank.streaming_heads[layer] for layer in layers)
                assert heads * span.block_size * rank.token_bytes <= layout.block_bytes
        kept = [span.recent_size for span in layout.spans]
        assert dict(zip(layout.bins, kept, strict=True)) == {(0, 2): 40, (1, 3): 9}

    def test_retrieval_heads_in_a_layer_that_slides_are_refused(self):
        shape = KVShape(retrieval_heads=(1,), streaming_heads=(1,), head_size=8, dtype_bytes=2)
        with pytest.raises(
            ValueError, match=r"layers \[0\] have a sliding window of their own and"
        ):
            plan_layout(shape, block_size=16, sink_size=4, recent_size=9, windows=(8,))

    def test_windows_of_another_model_are_refused(self):
        shape = KVShape(retrieval_heads=(0,), streaming_heads=(1,), head_size=8, dtype_bytes=2)
        with pytest.raises(ValueError, match="expected one entry for each of 1 layers, got 2"):
            plan_layout(shape, block_size=16, sink_size=4, recent_size=9, windows=(8, 8))
