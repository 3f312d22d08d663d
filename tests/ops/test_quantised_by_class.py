"""Streaming heads in the model's dtype beside quantised retrieval heads: each class as if alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.oracle import Store, run_step
from tests.ops.random_steps import cases, serve_case, sinks_of
from tests.ops.test_attention import (
    MASKS,
    assert_rule_holds,
    make_sequences,
    serve,
    serve_drafts,
)
from vllm_duo.kv_cache.formats import FORMATS
from vllm_duo.ops import cpu
from vllm_duo.ops.batch import SnapshotCopy
from vllm_duo.ops.quantise import dequantise, quantise

SCALES = (0.5, 0.03)  # of a layer


@pytest.fixture(autouse=True, params=sorted({"portable", cpu.isa()}))
def implementation(request, monkeypatch):
    """Which dtype a class has is decided outside of the variants: two of them are enough.

    The PyTorch operators do not read quantised caches.
    """
    before = cpu.isa()
    monkeypatch.setattr(cpu, "use_reference", False)
    cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa(before)


@pytest.fixture(params=[name for name in FORMATS if name != "fp8"])
def form(request):
    return FORMATS[request.param]


def as_kept(sequences, mask, form):
    """The sequences with what a quantised cache keeps of the retrieval heads' keys and values."""
    mask = torch.tensor(mask)[:, None]
    kept = []
    for s in sequences:
        k, v = dequantise(quantise(s.k, s.v, form, *SCALES), form, *SCALES)
        kept.append(
            dataclasses.replace(
                s, k=torch.where(mask, k, s.k.double()), v=torch.where(mask, v, s.v.double())
            )
        )
    return kept


def store_of(mask, form, *, head_size=64, requests=2, max_tokens=300, seed=0, **settings):
    return Store(
        mask,
        head_size,
        requests=requests,
        max_tokens=max_tokens,
        seed=seed,
        form=form,
        scales=SCALES,
        **{"streaming_quantised": False, **settings},
    )


@pytest.mark.parametrize(
    ("dtype", "chunk"),
    [(torch.float32, 1), (torch.bfloat16, 7), (torch.float16, 63), (torch.bfloat16, 1000)],
)
def test_each_class_is_the_rule_over_what_it_keeps(form, dtype, chunk):
    mask = MASKS["mixed"]
    lengths = [63, 200] if chunk > 1 else [90]
    store = store_of(mask, form, requests=len(lengths), dtype=dtype, seed=70)
    assert store.caches.streaming.dtype == dtype
    sequences = make_sequences(lengths, 4, 2, 64, dtype, seed=71)
    serve(store, sequences, lambda left: min(left, chunk), 0.125, decode_up_to=8)
    assert_rule_holds(as_kept(sequences, mask, form), mask, 20, 75, 0.125)
    store.assert_guards()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_class_computes_what_it_would_alone(form, dtype):
    """Bit for bit: the streaming heads of an unquantised cache, the retrieval heads of a quantised one.

    Decodes of one and of several items, drafts, chunks of prompts; operator by operator in float32.
    """
    group = 1 if dtype == torch.float32 else 4
    mask = MASKS["mixed"]
    chunks = [560, 1, 1, 5, 33, 100]
    sizes = {"head_size": 80, "max_tokens": 700, "recent_size": 600, "dtype": dtype, "seed": 72}
    stores = {
        "mixed": store_of(mask, form, **sizes),
        "quantised": store_of(mask, form, **sizes, streaming_quantised=True),
        "plain": store_of(mask, None, **sizes),
    }
    made = make_sequences([590, 700], 4, group, 80, dtype, seed=73)
    served = {name: [dataclasses.replace(s, outputs=[]) for s in made] for name in stores}
    for chunk in chunks:
        for name, store in stores.items():
            each = [min(chunk, len(s.q) - s.done) for s in served[name]]
            one_call = dtype != torch.float32
            run_step(store, served[name], each, 0.11, decode_up_to=8, one_call=one_call)
    assert all(s.done == len(s.q) for s in served["mixed"])
    of_class = torch.tensor(mask).repeat_interleave(group)
    for mixed, quantised, plain in zip(*served.values(), strict=True):
        mixed, quantised, plain = (torch.cat(s.outputs) for s in (mixed, quantised, plain))
        assert torch.equal(mixed[:, of_class], quantised[:, of_class])
        assert torch.equal(mixed[:, ~of_class], plain[:, ~of_class])
        assert not torch.equal(quantised[:, ~of_class], plain[:, ~of_class])
    caches = {name: store.caches for name, store in stores.items()}
    assert torch.equal(caches["mixed"].retrieval, caches["quantised"].retrieval)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(caches["mixed"].streaming.view(bits), caches["plain"].streaming.view(bits))


def test_tile_registers_are_given_back():
    """Decodes of both classes, then somebody else's multiplication in registers, twice."""
    mask = MASKS["mixed"]
    store = store_of(mask, FORMATS["int8_per_token_head"], dtype=torch.bfloat16, seed=80)
    sequences = make_sequences([96, 90], 4, 4, 64, torch.bfloat16, seed=81)
    ones = torch.ones(128, 128, dtype=torch.bfloat16)
    run_step(store, sequences, [92, 86], 0.125)
    for _ in range(4):
        run_step(store, sequences, [1, 1], 0.125)
        assert ((ones @ ones) == 128).all()
    kept = as_kept(sequences, mask, FORMATS["int8_per_token_head"])
    assert_rule_holds(kept, mask, 20, 75, 0.125)


@settings(max_examples=12, deadline=None)
@given(name=st.sampled_from(sorted(FORMATS)), case=cases(longest_span=200))
def test_random_shapes(name, case):
    settings = {"form": FORMATS[name], "scales": SCALES, "streaming_quantised": False}
    sequences, scale = serve_case(case, **settings)
    kept = as_kept(sequences, case["mask"], FORMATS[name])
    assert_rule_holds(kept, case["mask"], case["sink"], case["recent"], scale, sinks_of(case))


def test_a_restored_snapshot_is_the_state_it_was_stored_from(form):
    """One request stores its state in the middle of a chunk, another resumes there."""
    mask = [False, False]
    store = store_of(mask, form, head_size=32, requests=3, seed=74, dtype=torch.bfloat16)
    (first,) = make_sequences([200], 2, 2, 32, torch.bfloat16, seed=75)
    second = dataclasses.replace(first, outputs=[])
    blocks = store.ring.block_table[2].long()
    run_step(store, [first], [100], 0.2)
    run_step(store, [first], [80], 0.2, copies=[SnapshotCopy(True, 0, 150, blocks)])
    second.done = 150
    restore = SnapshotCopy(False, 0, 150, blocks)
    run_step(store, [second], [50], 0.2, rows=[1], copies=[restore])
    served = dataclasses.replace(
        first, outputs=[torch.cat([*first.outputs])[:150], *second.outputs]
    )
    assert_rule_holds([served], mask, 20, 75, 0.2)


@pytest.mark.parametrize("draft_size", [4, 9])
def test_rejected_drafts_leave_no_trace(form, draft_size):
    settings = {"form": form, "scales": SCALES, "streaming_quantised": False}
    kept = lambda made: as_kept(made, MASKS["mixed"], form)  # noqa: E731
    serve_drafts(draft_size, draft_size, 33, 63, kept=kept, **settings)


@pytest.mark.parametrize("mask", ["all_streaming", "all_retrieval"])
def test_layers_of_one_class(mask):
    form = FORMATS["int4_per_token_head"]
    store = store_of(MASKS[mask], form, seed=76)
    sequences = make_sequences([150, 30], 4, 2, 64, torch.float32, seed=77)
    serve(store, sequences, lambda left: min(left, 40), 0.125)
    assert_rule_holds(as_kept(sequences, MASKS[mask], form), MASKS[mask], 20, 75, 0.125)


def test_a_streaming_cache_of_another_dtype_is_named():
    store = store_of([False], FORMATS["fp8"], head_size=16, requests=1, max_tokens=20)
    streaming = store.caches.streaming.half()
    store.caches = dataclasses.replace(store.caches, streaming=streaming)
    sequences = make_sequences([20], 1, 1, 16, torch.float32, seed=78)
    with pytest.raises(ValueError, match=r"streaming cache must be \[N, 1, 8, 32\] of the key's"):
        run_step(store, sequences, [20], 0.25)


def test_two_quantised_dtypes_are_refused(monkeypatch):
    """No layer has them: the kernels quantise a step's tokens once."""
    one, other = (
        store_of([True, False], FORMATS[name], streaming_quantised=True, requests=1)
        for name in ("fp8", "fp8_e5m2")
    )
    view = cpu._cache
    forms = {
        id(one.caches.retrieval): FORMATS["fp8"],
        id(other.caches.streaming): other.caches.form,
    }
    monkeypatch.setattr(
        cpu, "_cache", lambda name, tensor, _: view(name, tensor, forms[id(tensor)])
    )
    one.caches = dataclasses.replace(one.caches, streaming=other.caches.streaming)
    sequences = make_sequences([20], 2, 1, 64, torch.float32, seed=79)
    with pytest.raises(ValueError, match="two quantised dtypes, expected one"):
        run_step(one, sequences, [20], 0.25)
