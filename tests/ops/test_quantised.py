"""Quantised caches: the kernels' numbers are the reference's, attention is that over these numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.oracle import SINKS, Store, make_sinks, run_step
from tests.ops.random_steps import cases, serve_case, sinks_of
from tests.ops.test_attention import (
    MASKS,
    assert_not_a_number_shows,
    assert_rule_holds,
    make_sequences,
    serve,
    serve_drafts,
)
from vllm_duo.kv_cache.formats import FORMATS
from vllm_duo.ops.batch import Batch, SnapshotCopy
from vllm_duo.ops.quantise import dequantise, quantise
from vllm_duo.ops.write_kv import write_kv

SCALES = (0.5, 0.03)  # of a layer; the values would saturate nowhere and round everywhere


@pytest.fixture(autouse=True)
def _kernels(implementation):
    if implementation == "reference":
        pytest.skip("the PyTorch operators do not read quantised caches: test_reference_refuses")


@pytest.fixture(params=[name for name in FORMATS if name != "fp8"])
def form(request):
    return FORMATS[request.param]


def as_kept(sequences, form, scales=SCALES):
    """The sequences with the keys and values that a cache keeps of them."""
    kept = []
    for s in sequences:
        k, v = dequantise(quantise(s.k, s.v, form, *scales), form, *scales)
        kept.append(dataclasses.replace(s, k=k, v=v))
    return kept


def written(k, v, form, scales=SCALES):
    """[n, Hkv, row bytes] that the kernels write for these tokens."""
    n, heads, size = k.shape
    store = Store(
        [True] * heads,
        size,
        requests=1,
        max_tokens=n,
        dtype=k.dtype,
        seed=0,
        form=form,
        scales=scales,
    )
    batch = Batch.from_host(np.array([0, n]), np.array([n]), 0)
    write_kv(k, v, store.heads, store.caches, batch)
    block, offset = np.divmod(np.arange(n), store.paged.block_size)
    return store.caches.retrieval[store.paged.block_table[0, block], :, offset]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [16, 80, 128])
def test_numbers_are_the_references(form, dtype, head_size):
    generator = torch.Generator().manual_seed(50)
    k, v = (torch.randn(40, 3, head_size, generator=generator) for _ in range(2))
    # From far below the least number to far above the greatest.
    k *= torch.logspace(-6, 4, 40)[:, None, None]
    k, v = k.to(dtype), v.to(dtype)
    assert torch.equal(written(k, v, form), quantise(k, v, form, *SCALES))


def test_every_tie_and_every_number_rounds_as_the_reference(form):
    """Halfway between any two neighbours, and one step of float32 to each side of it."""
    numbers = torch.arange(256, dtype=torch.uint8)
    row = torch.cat([numbers, numbers])
    if form.token_scales:
        row = torch.cat([row, torch.ones(2).view(torch.uint8)])
    exact = dequantise(row, form)[0].float()
    exact = exact[exact.isfinite()].sort().values
    ties = (exact[1:] + exact[:-1]) / 2
    around = [
        ties,
        ties.nextafter(torch.tensor(torch.inf)),
        ties.nextafter(-torch.tensor(torch.inf)),
    ]
    values = torch.cat([exact, *around])
    values = torch.nn.functional.pad(values, (0, -len(values) % 15)).reshape(-1, 1, 15)
    # A token's own scale is 1 with the greatest number beside.
    values = torch.nn.functional.pad(values, (0, 1), value=form.greatest)
    assert torch.equal(written(values, values, form, (1.0, 1.0)), quantise(values, values, form))


def test_zeros_and_what_is_not_finite(form):
    rows = torch.zeros(6, 1, 16)
    rows[1, 0, 3] = torch.nan
    rows[2, 0, 5] = torch.inf
    rows[3, 0, 5] = -1e30
    rows[4] = 1e-42
    rows[5, 0, ::2] = -0.0
    held = written(rows, rows, form, (1.0, 1.0))
    keys, values = dequantise(held, form)
    assert torch.equal(keys.nan_to_num(), values.nan_to_num())
    assert (keys[[0, 4, 5]] == 0).all()
    # NaN stays what it is; infinity saturates, or makes its token NaN: never a number like others.
    assert keys[1].isnan().any()
    assert keys[2].isnan().any() or keys[2].max() == form.greatest
    assert torch.isclose(
        keys[3].min(), torch.tensor(-1e30 if form.token_scales else -form.greatest).double()
    )


@pytest.mark.parametrize("chunk", [1, 41])
@pytest.mark.parametrize("name", "kv")
def test_what_is_not_a_number_shows(form, name, chunk):
    """Also where it is not the token that is computed, but what a cache keeps of it."""
    store = Store(
        [True, True, False],
        32,
        requests=1,
        max_tokens=60,
        sink_size=4,
        recent_size=9,
        seed=66,
        form=form,
        scales=SCALES,
    )
    (s,) = make_sequences([60], 3, 2, 32, torch.float32, seed=67)
    getattr(s, name)[20, 1:, 5] = torch.nan
    serve(store, [s], lambda left: 19 if left == 60 else min(left, chunk), 0.2)
    assert_not_a_number_shows(name, s, exactly=name == "k" or chunk == 1)


@pytest.mark.parametrize(
    ("dtype", "chunk"),
    [
        (torch.float32, 1),
        (torch.float32, 7),
        (torch.float32, 1000),
        (torch.bfloat16, 63),
        (torch.float16, 63),
    ],
)
def test_result_is_the_rule_over_what_is_kept(form, dtype, chunk):
    """Also of a chunk's own tokens, so that no chunk size is another answer."""
    mask = MASKS["mixed"]
    lengths = [63, 200] if chunk > 1 else [90]
    store = Store(
        mask,
        64,
        requests=len(lengths),
        max_tokens=300,
        dtype=dtype,
        seed=51,
        form=form,
        scales=SCALES,
    )
    sequences = make_sequences(lengths, 4, 2, 64, dtype, seed=52)
    serve(store, sequences, lambda left: min(left, chunk), 0.125, decode_up_to=8)
    assert_rule_holds(as_kept(sequences, form), mask, 20, 75, 0.125)
    store.assert_guards()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_of_large_scores_are_not_rounded(form, dtype):
    """Scores differ by hundreds: one rounding of a rotated query to bf16 would be several per cent."""
    store = Store(
        MASKS["mixed"],
        64,
        requests=1,
        max_tokens=200,
        dtype=dtype,
        seed=53,
        form=form,
        scales=SCALES,
    )
    sequences = make_sequences([200], 4, 2, 64, dtype, seed=54)
    serve(store, sequences, lambda left: min(left, 120), 8.0)
    assert_rule_holds(as_kept(sequences, form), MASKS["mixed"], 20, 75, 8.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.25 * 2**-23, 296.0])
def test_outputs_of_any_size_round_as_torchs(scale, dtype):
    """Ties, subnormal halves and infinite ones: of one token, so that the output is its value."""
    form = FORMATS["fp8"]
    rows = torch.arange(256, dtype=torch.uint8).repeat(2)
    values = dequantise(rows, form, 1.0, scale)[1].nan_to_num().clamp(-65504, 65504).to(dtype)
    (s,) = make_sequences([1], 1, 1, 256, dtype, seed=68)
    s.v[:] = values
    store = Store(
        [True],
        256,
        requests=1,
        max_tokens=1,
        dtype=dtype,
        seed=69,
        form=form,
        scales=(1.0, scale),
    )
    serve(store, [s], lambda left: left, 0.0625)
    (kept,) = as_kept([s], form, (1.0, scale))
    assert torch.equal(s.outputs[0], kept.v.to(dtype))


@settings(max_examples=12, deadline=None)
@given(name=st.sampled_from(sorted(FORMATS)), case=cases(longest_span=200))
def test_random_shapes(name, case):
    form = FORMATS[name]
    sequences, scale = serve_case(case, form=form, scales=SCALES)
    kept = as_kept(sequences, form)
    rule = (case["mask"], case["sink"], case["recent"], scale)
    assert_rule_holds(kept, *rule, sinks_of(case))


@pytest.mark.parametrize("kind", SINKS)
def test_learned_sinks_over_what_is_kept(form, kind):
    """Decoded whole, in parts that are merged, and prefilled."""
    sinks = make_sinks(kind, 8)
    store = Store(
        [True, False],
        64,
        requests=2,
        max_tokens=700,
        recent_size=600,
        seed=64,
        form=form,
        scales=SCALES,
        sinks=sinks,
    )
    sequences = make_sequences([620, 45], 2, 4, 64, torch.float32, seed=65)
    serve(
        store,
        sequences,
        lambda left: min(left, 3) if left <= 12 else min(left - 12, 150),
        0.125,
        decode_up_to=3,
    )
    assert_rule_holds(as_kept(sequences, form), [True, False], 20, 600, 0.125, sinks)


def test_long_requests_are_split_and_merged(form):
    store = Store(
        [True, False],
        64,
        requests=2,
        max_tokens=1700,
        recent_size=700,
        seed=53,
        form=form,
        scales=SCALES,
    )
    sequences = make_sequences([1700, 1100], 2, 3, 64, torch.float32, seed=54)
    serve(store, sequences, lambda left: min(left, 1 if left <= 10 else min(left - 10, 650)), 0.125)
    assert_rule_holds(as_kept(sequences, form), [True, False], 20, 700, 0.125)


def test_a_restored_snapshot_is_the_state_it_was_stored_from(form):
    """One request stores its state in the middle of a chunk, another resumes there."""
    mask = [False, False]
    store = Store(mask, 32, requests=3, max_tokens=300, seed=55, form=form, scales=SCALES)
    (first,) = make_sequences([200], 2, 2, 32, torch.float32, seed=56)
    second = dataclasses.replace(first, outputs=[])
    blocks = store.ring.block_table[2].long()
    run_step(store, [first], [100], 0.2)
    store_copy = SnapshotCopy(True, 0, 150, blocks)
    run_step(store, [first], [80], 0.2, copies=[store_copy])
    second.done = 150
    restore = SnapshotCopy(False, 0, 150, blocks)
    run_step(store, [second], [50], 0.2, rows=[1], copies=[restore])
    first.outputs = [*first.outputs]
    run_step(store, [first], [20], 0.2)
    served = dataclasses.replace(first, outputs=[torch.cat(first.outputs)[:150], *second.outputs])
    assert_rule_holds(as_kept([served], form), mask, 20, 75, 0.2)
    assert_rule_holds(as_kept([first], form), mask, 20, 75, 0.2)


@pytest.mark.parametrize("draft_size", [4, 9])
def test_rejected_drafts_leave_no_trace(form, draft_size):
    settings = {"form": form, "scales": SCALES}
    serve_drafts(draft_size, draft_size, 33, 63, kept=lambda made: as_kept(made, form), **settings)


def test_reference_refuses(monkeypatch):
    from vllm_duo.ops import cpu

    monkeypatch.setattr(cpu, "use_reference", True)
    store = Store([True], 16, requests=1, max_tokens=20, seed=57, form=FORMATS["fp8"])
    sequences = make_sequences([20], 1, 1, 16, torch.float32, seed=58)
    with pytest.raises(ValueError, match="only the compiled CPU kernels"):
        run_step(store, sequences, [20], 0.25)


def test_a_cache_of_another_row_is_named():
    store = Store([True], 16, requests=1, max_tokens=20, seed=59, form=FORMATS["fp8"])
    store.caches = dataclasses.replace(store.caches, form=FORMATS["int8_per_token_head"])
    sequences = make_sequences([20], 1, 1, 16, torch.float32, seed=60)
    with pytest.raises(ValueError, match=r"must be \[N, 1, 16, 40\] of the quantised dtype"):
        run_step(store, sequences, [20], 0.25)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scales_must_be_positive(scale):
    store = Store(
        [True], 16, requests=1, max_tokens=20, seed=61, form=FORMATS["fp8"], scales=(1.0, scale)
    )
    sequences = make_sequences([20], 1, 1, 16, torch.float32, seed=62)
    with pytest.raises(ValueError, match="scales of a quantised cache must be positive"):
        run_step(store, sequences, [20], 0.25)
