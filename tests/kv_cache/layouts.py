"""Layouts for the tests of their arithmetic: shapes by hand and by hypothesis."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import strategies as st

from vllm_duo.kv_cache.formats import FORMATS, row_bytes
from vllm_duo.kv_cache.layout import Layout, plan_layout
from vllm_duo.kv_cache.shape import KVShape

lengths = st.integers(1, 5000)
shapes = st.builds(
    lambda heads, head_size, dtype_bytes, draft_token_bytes, kept, skipped: KVShape(
        retrieval_heads=tuple(retrieval for retrieval, _ in heads),
        streaming_heads=tuple(streaming for _, streaming in heads),
        head_size=head_size,
        dtype_bytes=dtype_bytes,
        row_bytes=row_bytes(kept[0], head_size),
        streaming_quantised=kept[1],
        skipped_layers=frozenset(layer for layer in range(len(heads)) if skipped >> layer & 1),
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
    # A bit of each layer that keeps the model's dtype.
    st.just(0) | st.integers(1, 2**12 - 1),
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


def token_bytes(shape: KVShape) -> list[tuple[int, int]]:
    """Bytes of a token in all retrieval and in all streaming heads of each layer."""
    model = 2 * shape.head_size * shape.dtype_bytes
    quantised = model if shape.row_bytes is None else shape.row_bytes
    heads = zip(shape.retrieval_heads, shape.streaming_heads, strict=True)
    found = []
    for layer, (retrieval, streaming) in enumerate(heads):
        own = model if layer in shape.skipped_layers else quantised
        found.append((retrieval * own, streaming * (own if shape.streaming_quantised else model)))
    return found


def shape_of(
    retrieval: list[int],
    streaming: list[int],
    drafts: int = 0,
    row_bytes: int | None = None,
    skipped: Iterable[int] = (),
) -> KVShape:
    """Heads of 128 bytes a token; with ``row_bytes`` the retrieval heads have these instead, but for
    those of layers that are skipped."""
    return KVShape(
        retrieval_heads=tuple(retrieval),
        streaming_heads=tuple(streaming),
        head_size=16,
        dtype_bytes=4,
        row_bytes=row_bytes,
        streaming_quantised=row_bytes is None,
        skipped_layers=frozenset(skipped),
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
