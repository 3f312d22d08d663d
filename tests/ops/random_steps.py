"""Random shapes of everything, for any format of cache."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from tests.ops.oracle import MEMORY_LAYOUTS, SINKS, Store, make_sinks
from tests.ops.test_attention import make_sequences, serve


def sinks_of(case):
    """[Hq] learned sinks of a case drawn from ``cases``, or None."""
    return case["sinks"] and make_sinks(
        case["sinks"], case["group"] * len(case["mask"]), case["seed"]
    )


def cases(longest_span):
    """Sinks and spans up to ``longest_span`` tokens, that cross everything."""
    return st.fixed_dictionaries(
        {
            "mask": st.lists(st.booleans(), min_size=1, max_size=3),
            "group": st.integers(1, 16),
            "head_size": st.sampled_from([16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256]),
            "block": st.sampled_from([8, 16, 24, 128]),
            "ring_block": st.sampled_from([1, 7, 8, 13, 128]),
            "sink": st.integers(0, longest_span),
            "recent": st.integers(1, longest_span),
            "lengths": st.lists(st.integers(1, 300), min_size=1, max_size=3),
            "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
            "longest": st.sampled_from([1, 9, 40, 300]),
            "layouts": st.tuples(*[st.sampled_from(MEMORY_LAYOUTS)] * 4),
            "one_call": st.booleans(),
            "sinks": st.sampled_from([None, None, *SINKS]),
            "seed": st.integers(0, 1000),
        }
    )


def serve_case(case, **settings):
    """Serve a case's sequences; half of the steps leave some requests empty.

    Args:
        case: drawn from ``cases``.
        settings: further ones of the store.

    Returns:
        The sequences with their outputs, the scale of their logits.
    """
    rng = np.random.default_rng(case["seed"])
    store = Store(
        case["mask"],
        case["head_size"],
        requests=len(case["lengths"]),
        max_tokens=300,
        block_size=case["block"],
        streaming_block_size=case["ring_block"],
        sink_size=case["sink"],
        recent_size=case["recent"],
        dtype=case["dtype"],
        seed=case["seed"],
        sinks=sinks_of(case),
        **settings,
    )
    heads = (len(case["mask"]), case["group"], case["head_size"])
    sequences = make_sequences(case["lengths"], *heads, case["dtype"], case["seed"])
    scale = case["head_size"] ** -0.5
    # All but the last tokens come in long chunks, so that every length of a chunk takes part.
    serve(
        store,
        sequences,
        lambda left: min(left, int(rng.integers(0, (case["longest"] if left < 40 else 120) + 1))),
        scale,
        decode_up_to=8,
        layouts=case["layouts"],
        one_call=case["one_call"],
    )
    store.assert_guards()
    return sequences, scale
