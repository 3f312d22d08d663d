"""Random shapes of everything against float64, over the reference and every variant."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.oracle import MEMORY_LAYOUTS, Store
from tests.ops.test_attention import assert_rule_holds, make_sequences, serve


@settings(max_examples=25, deadline=None)
@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=3),
    group=st.integers(1, 16),
    head_size=st.sampled_from([16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256]),
    block=st.sampled_from([8, 16, 24, 128]),
    ring_block=st.sampled_from([1, 7, 8, 13, 128]),
    sink=st.integers(0, 500),
    recent=st.integers(1, 500),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    longest=st.sampled_from([1, 9, 40, 300]),
    layouts=st.tuples(*[st.sampled_from(MEMORY_LAYOUTS)] * 4),
    one_call=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_random_shapes(
    mask,
    group,
    head_size,
    block,
    ring_block,
    sink,
    recent,
    lengths,
    dtype,
    longest,
    layouts,
    one_call,
    seed,
):
    """Sinks and spans that cross everything; half of the steps leave some requests empty."""
    rng = np.random.default_rng(seed)
    store = Store(
        mask,
        head_size,
        requests=len(lengths),
        max_tokens=300,
        block_size=block,
        streaming_block_size=ring_block,
        sink_size=sink,
        recent_size=recent,
        dtype=dtype,
        seed=seed,
    )
    sequences = make_sequences(lengths, len(mask), group, head_size, dtype, seed)
    # All but the last tokens come in long chunks, so that every length of a chunk takes part.
    serve(
        store,
        sequences,
        lambda left: min(left, int(rng.integers(0, (longest if left < 40 else 120) + 1))),
        head_size**-0.5,
        decode_up_to=8,
        layouts=layouts,
        one_call=one_call,
    )
    assert_rule_holds(sequences, mask, sink, recent, head_size**-0.5)
    store.assert_guards()


def test_long_requests_are_split_and_merged():
    """More keys than one item of the work queue holds."""
    store = Store([True, False], 64, requests=2, max_tokens=1700, recent_size=700, seed=30)
    sequences = make_sequences([1700, 1100], 2, 3, 64, torch.float32, seed=31)
    serve(store, sequences, lambda left: min(left, 1 if left <= 10 else min(left - 10, 650)), 0.125)
    assert_rule_holds(sequences, [True, False], 20, 700, 0.125)
