"""Slots and blocks of a streaming head: worked examples and properties."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kv_cache.layouts import lengths
from vllm_duo.kv_cache.rounding import cdiv
from vllm_duo.kv_cache.span import StreamingSpan

SPAN = StreamingSpan(sink_size=64, recent_size=256, block_size=16)

spans = st.builds(
    StreamingSpan,
    sink_size=st.integers(0, 70),
    recent_size=st.integers(1, 300),
    draft_size=st.integers(0, 8),
    block_size=st.integers(1, 65),
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


@pytest.mark.parametrize(
    ("name", "value"),
    [("sink_size", -1), ("recent_size", 0), ("block_size", 0), ("draft_size", -1)],
)
def test_impossible_span(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least {value + 1} tokens, got"):
        replace(SPAN, **{name: value})


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
