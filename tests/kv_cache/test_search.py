"""What the search for block sizes and bins settles on, and how fast."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tests.kv_cache.layouts import is_within_stock, partitions, plans, shape_of, token_bytes
from vllm_duo.kv_cache.layout import KVShape, Layout, plan_layout
from vllm_duo.kv_cache.search import HELD_TOLERANCE

few_layers = st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 8)).filter(any), min_size=1, max_size=4
).filter(lambda heads: any(r for r, _ in heads) and any(s for _, s in heads))


def _small_plan(heads, drafts, row, streaming_quantised, skipped, **sizes):
    shape = shape_of(
        [retrieval for retrieval, _ in heads],
        [streaming for _, streaming in heads],
        drafts,
        row,
        [layer for layer in skipped if layer < len(heads)],
    )
    return plan_layout(replace(shape, streaming_quantised=streaming_quantised), **sizes)


small_plans = st.builds(
    _small_plan,
    few_layers,
    st.sampled_from([0, 0, 96, 1536]),
    # Of a quantised head's token; another's has 128 bytes.
    st.sampled_from([None, None, 24, 40]),
    st.booleans(),
    st.sampled_from([(), (), (0,), (0, 2)]),
    block_size=st.sampled_from([1, 3, 8, 16]),
    sink_size=st.integers(0, 9),
    recent_size=st.integers(1, 20),
    reference_tokens=st.sampled_from([5, 64, 32_768]),
)


def all_layouts(like: Layout):
    """Every layout of the same heads and sizes: each partition, ``P_s`` and tightest block."""
    shape = like.shape
    for bins in partitions([at for at, heads in enumerate(shape.streaming_heads) if heads]):
        sizes = token_bytes(shape)
        width = max((sum(sizes[at][1] for at in layers) for layers in bins), default=0)
        for size in range(1, like.span.slots + 1):
            paged = shape.paged_token_bytes * like.block_size
            yield replace(
                like,
                bins=tuple(map(tuple, bins)),
                span=replace(like.span, block_size=size),
                block_bytes=max(paged, width * size),
            )


class TestSearch:
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
        within = [
            other
            for other in candidates
            if layout.shape.has_one_format and all(is_within_stock(other, n) for n in lengths)
        ]
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
        assume(layout.has_retrieval and layout.bins and shape.has_one_format)
        paged = shape.paged_token_bytes * layout.block_size
        size = paged // shape.ring_token_bytes
        assume(size * (size + 1) >= slots - 1)
        assert all(is_within_stock(layout, n) for n in range(1, slots + 50))
        assert is_within_stock(layout, 10**6)


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
