"""Layouts for the tests of their arithmetic: shapes by hand and by hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from vllm_duo.kv_cache.formats import FORMATS, row_bytes
from vllm_duo.kv_cache.layout import Layout, plan_layout
from vllm_duo.kv_cache.shape import KVShape

lengths = st.integers(1, 5000)
shapes = st.builds(
    lambda heads, head_size, dtype_bytes, draft_token_bytes, kept: KVShape(
        retrieval_heads=tuple(retrieval for retrieval, _ in heads),
        streaming_heads=tuple(streaming for _, streaming in heads),
        head_size=head_size,
        dtype_bytes=dtype_bytes,
        row_bytes=row_bytes(kept[0], head_size),
        streaming_quantised=kept[1],
        draft_token_bytes=draft_token_bytes,
    ),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)).filter(any), min_size=1, max_size=12),
    st.sampled_from([16, 128]),
    st.sampled_from([2, 4]),
    # A draft model's heads need not be as wide as the others.
    st.sampled_from([0, 0, 96, 1536]),
    # The format of the cache, and whether it is the streaming heads', too.
    st.sampled_from([("auto", True), ("auto", False)])
    | st.tuples(st.sampled_from(sorted(FORMATS)), st.booleans()),
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


def shape_of(
    retrieval: list[int], streaming: list[int], drafts: int = 0, row_bytes: int | None = None
) -> KVShape:
    """Heads of 128 bytes a token; with ``row_bytes`` the retrieval heads have these instead."""
    return KVShape(
        retrieval_heads=tuple(retrieval),
        streaming_heads=tuple(streaming),
        head_size=16,
        dtype_bytes=4,
        row_bytes=row_bytes,
        streaming_quantised=row_bytes is None,
        draft_token_bytes=drafts,
    )


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
