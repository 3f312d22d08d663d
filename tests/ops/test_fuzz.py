"""Random shapes of everything against float64, over the reference and every variant."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings

from tests.ops.oracle import Store
from tests.ops.random_steps import cases, serve_case, sinks_of
from tests.ops.test_attention import assert_rule_holds, make_sequences, serve


@settings(max_examples=25, deadline=None)
@given(case=cases(longest_span=500))
def test_random_shapes(case):
    sequences, scale = serve_case(case)
    rule = (case["mask"], case["sink"], case["recent"], scale)
    assert_rule_holds(sequences, *rule, sinks_of(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_requests_are_split_and_merged(dtype):
    """More keys than one item of the work queue holds, more rows and more tiles of keys."""
    store = Store(
        [True, False], 64, requests=2, max_tokens=1700, recent_size=700, dtype=dtype, seed=30
    )
    sequences = make_sequences([1700, 1100], 2, 3, 64, dtype, seed=31)
    serve(store, sequences, lambda left: min(left, 1 if left <= 10 else min(left - 10, 650)), 0.125)
    assert_rule_holds(sequences, [True, False], 20, 700, 0.125)
    store.assert_guards()


@pytest.mark.parametrize(
    ("dtype", "head_size", "tokens"), [(torch.float32, 80, 1), (torch.bfloat16, 64, 4)]
)
@pytest.mark.parametrize(
    ("sink", "recent"), [(20, 493), (512, 40), (600, 500)], ids=["ring", "sink", "inside the sink"]
)
def test_items_end_where_keys_do(sink, recent, dtype, head_size, tokens):
    """Decodes over the keys of one item (512), one fewer, and one and two more, in both classes.

    Of 4 tokens the first ones see no key of the second item. The ids say what of the streaming heads
    ends beside their first item.
    """
    store = Store(
        [True, False],
        head_size,
        requests=1,
        max_tokens=514,
        sink_size=sink,
        recent_size=recent,
        dtype=dtype,
        draft_size=3,
        seed=37,
    )
    sequences = make_sequences([514], 2, 2, head_size, dtype, seed=38)
    chunks = iter([510, *[tokens] * (4 // tokens)])
    serve(store, sequences, lambda left: next(chunks), head_size**-0.5, decode_up_to=tokens)
    assert_rule_holds(sequences, [True, False], sink, recent, head_size**-0.5)
    store.assert_guards()


@pytest.mark.parametrize("head_size", [32, 96, 128])
def test_decodes_of_several_lengths_follow_each_other(head_size):
    """Items with other numbers of rows on one thread, which may set registers up for the last one's."""
    mask, scale = [True, False, True], head_size**-0.5
    store = Store(
        mask, head_size, requests=6, max_tokens=300, draft_size=7, dtype=torch.bfloat16, seed=34
    )
    sequences = make_sequences(
        [300, 299, 270, 255, 201, 190], 3, 2, head_size, torch.bfloat16, seed=35
    )
    random = Random(36)
    serve(
        store,
        sequences,
        lambda left: min(left, 150 if left > 150 else random.randint(1, 8)),
        scale,
        decode_up_to=8,
    )
    assert_rule_holds(sequences, mask, 20, 75, scale)
    store.assert_guards()


@pytest.mark.parametrize("scale", [-0.125, 0.0])
def test_a_scale_may_turn_scores_around(scale):
    """Or make them all alike: whoever compares scores before they are scaled has to know."""
    store = Store([True, False], 64, requests=1, max_tokens=190, dtype=torch.bfloat16, seed=32)
    sequences = make_sequences([190], 2, 2, 64, torch.bfloat16, seed=33)
    serve(store, sequences, lambda left: 90 if left > 10 else 1, scale)
    assert_rule_holds(sequences, [True, False], 20, 75, scale)
