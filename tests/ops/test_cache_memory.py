"""Caches need not be contiguous, and their blocks may lie gigabytes apart."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.ops.oracle import CACHE_LAYOUTS, Store, slots_apart
from tests.ops.steps import far_apart
from tests.ops.test_attention import MASKS, assert_rule_holds, make_sequences, serve


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_caches_have_their_own_strides(layout):
    store = Store(MASKS["mixed"], 32, requests=2, max_tokens=200, seed=24)
    retrieval, streaming = layout(store.caches.retrieval), layout(store.caches.streaming)
    store.caches = dataclasses.replace(store.caches, retrieval=retrieval, streaming=streaming)
    sequences = make_sequences([200, 61], 4, 2, 32, torch.float32, seed=25)
    serve(
        store, sequences, lambda left: min(left, 60 if left > 10 else 3), 32**-0.5, decode_up_to=3
    )
    assert_rule_holds(sequences, MASKS["mixed"], 20, 75, 32**-0.5)
    store.assert_guards()
    if layout is slots_apart:
        assert all(cache._base[..., -16:].isnan().all() for cache in (retrieval, streaming))


def test_addresses_beyond_2_to_the_31_bytes():
    store = Store(MASKS["mixed"], 32, requests=1, max_tokens=150, dtype=torch.bfloat16, seed=26)
    store.caches = dataclasses.replace(
        store.caches,
        retrieval=far_apart(store.caches.retrieval, store.paged),
        streaming=far_apart(store.caches.streaming, store.ring),
    )
    sequences = make_sequences([150], 4, 2, 32, torch.bfloat16, seed=27)
    serve(
        store, sequences, lambda left: min(left, 70 if left > 10 else 3), 32**-0.5, decode_up_to=3
    )
    assert_rule_holds(sequences, MASKS["mixed"], 20, 75, 32**-0.5)
