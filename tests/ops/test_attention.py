"""decode, prefill and write_kv against dense attention, over whole served sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.oracle import (
    MEMORY_LAYOUTS,
    Sequence,
    Store,
    dense_attention,
    float32_error,
    fused,
    run_step,
)
from vllm_duo.ops import pieces

MASKS = {
    "mixed": [True, False, True, False],
    "all_retrieval": [True] * 4,
    "all_streaming": [False] * 4,
    "one_retrieval": [False, False, False, True],
}


def make_sequences(lengths, num_kv_heads, group, head_size, dtype, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(n, heads):
        return torch.randn(n, heads, head_size, generator=generator, dtype=torch.float64).to(dtype)

    return [
        # Keys twice as large as usual: attention with clear peaks shows a wrong key.
        Sequence(
            random(n, num_kv_heads * group), 2 * random(n, num_kv_heads), random(n, num_kv_heads)
        )
        for n in lengths
    ]


def serve(store, sequences, chunk_of, scale, **kwargs):
    """Serve all sequences to their end; ``chunk_of(left)`` tokens a step and sequence."""
    while any(s.done < len(s.q) for s in sequences):
        run_step(
            store, sequences, [chunk_of(len(s.q) - s.done) for s in sequences], scale, **kwargs
        )


def assert_rule_holds(sequences, mask, sink_size, recent_size, scale, sinks=None):
    """Compare with float64; the bound is twice the error of the same maths in float32.

    The operators compute in float32 for every narrower dtype and round once at the end, so that
    rounding is added: a unit in the last place, where half a one is due. Prefill in bf16 products
    rounds the weights too, each by half a unit at most: that is the other half.
    """
    for s in sequences:
        rule = (s.q, s.k, s.v, mask, sink_size, recent_size, scale)
        exact = dense_attention(*rule, sinks=sinks)
        plain_error = float32_error(exact, *rule, sinks=sinks)
        rounding = torch.finfo(s.q.dtype).eps * exact.abs().max()
        # The floor is a few float32 roundings, as in steps.py: short rows can be exact by luck in one
        # order of sums.
        bound = 2 * plain_error + rounding + 8 * torch.finfo(torch.float32).eps
        served = torch.cat(s.outputs).double()
        assert (served - exact).abs().max() <= bound


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("chunk", [16, 63, 1000])
def test_result_is_the_rule_for_every_chunk_size(mask, group, chunk):
    lengths = [1, 63, 129, 200]
    store = Store(
        MASKS[mask],
        32,
        requests=4,
        max_tokens=300,
        seed=0,
    )
    sequences = make_sequences(lengths, 4, group, 32, torch.float32, seed=1)
    serve(store, sequences, lambda left: min(left, chunk), 32**-0.5)
    assert_rule_holds(sequences, MASKS[mask], 20, 75, 32**-0.5)
    store.assert_guards()


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.bfloat16, marks=pytest.mark.feature("bfloat16, operators")),
        pytest.param(torch.float16, marks=pytest.mark.feature("float16, operators")),
        torch.float64,
    ],
)
def test_other_dtypes_round_once(dtype, implementation):
    if dtype == torch.float64 and implementation != "reference":
        pytest.skip("float64 exists in the reference alone; test_cpu.py says what kernels answer")
    store = Store(
        MASKS["mixed"],
        64,
        requests=2,
        max_tokens=200,
        streaming_block_size=16,
        sink_size=4,
        recent_size=33,
        dtype=dtype,
        seed=2,
    )
    sequences = make_sequences([200, 131], 4, 2, 64, dtype, seed=3)
    serve(store, sequences, lambda left: min(left, 50), 0.125)
    assert_rule_holds(sequences, MASKS["mixed"], 4, 33, 0.125)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scores", ["steep", "rising", "falling", "far below 0", "far above 0"])
def test_scores_of_any_size(scores, dtype):
    """Tile after tile of keys moves what weights are relative to, or leaves it far away.

    In chunks of prompts, drafts and single tokens.
    """
    length, scale = 900, 0.125
    store = Store(MASKS["mixed"], 64, requests=1, max_tokens=length, dtype=dtype, seed=4)
    (sequence,) = make_sequences([length], 4, 2, 64, dtype, seed=5)
    position = torch.arange(length).view(-1, 1, 1) / length
    if scores == "steep":
        # Weights of nearly all keys are below what float32 holds.
        scale = 8.0
    elif scores in ("rising", "falling"):
        # All queries and keys point the same way, and keys grow or shrink from token to token.
        size = 1 + position if scores == "rising" else 2 - position
        sequence.q[:] = sequence.q.abs()
        sequence.k[:] = (sequence.k.abs() * 3 * size).to(dtype)
    else:
        # The first element alone adds +-3000 to every score: exact, so that nothing else is lost.
        sequence.q[..., 0] = 128
        sequence.k[..., 0] = 192 if scores == "far above 0" else -192
    chunks = iter([300, 300, 292, 3, 3, 1, 1])
    serve(store, [sequence], lambda left: next(chunks), scale, decode_up_to=3)
    assert_rule_holds([sequence], MASKS["mixed"], 20, 75, scale)
    store.assert_guards()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [1, 3, 41])
@pytest.mark.parametrize("name", "kv")
def test_what_is_not_a_number_shows(name, chunk, dtype):
    """One element of a token: NaN for all who see it, and in no other head."""
    mask = [True, True, False]
    store = Store(
        mask, 32, requests=1, max_tokens=60, sink_size=4, recent_size=9, dtype=dtype, seed=32
    )
    (s,) = make_sequences([60], 3, 2, 32, dtype, seed=33)
    getattr(s, name)[20, 1:, 5] = torch.nan
    serve(store, [s], lambda left: 19 if left == 60 else min(left, chunk), 0.2, decode_up_to=3)
    assert_not_a_number_shows(name, s, exactly=name == "k" or chunk == 1)


def assert_not_a_number_shows(name, sequence, *, exactly):
    """Of token 20, in KV heads 1 and 2 of two query heads; the last one streams 9 recent tokens.

    A value's may show in a chunk's other rows too, which meet it with a weight of 0.
    """
    wrong = torch.cat(sequence.outputs).isnan()
    seen = torch.zeros(wrong.shape[:2], dtype=torch.bool)
    seen[20:, 2:4] = seen[20:29, 4:] = True
    assert wrong.any(-1)[seen].all()
    assert not wrong[:, :2].any()
    assert not exactly or not wrong[~seen].any()


def test_weights_of_prefill_in_bf16_are_right_beyond_its_rounding():
    """Half of the keys weigh 1, the others 2 ** -e, with values of which some cancel them.

    What is left is near 0, where bf16 has small steps, and the others' exponents differ by up to 1/32
    (nine steps of bf16), so that the weights' own rounding averages out.
    """
    keys, queries = 64, 64
    length = 2 * keys + queries
    (s,) = make_sequences([length], 1, 1, 64, torch.bfloat16, seed=28)
    for tensor in (s.q, s.k, s.v):
        tensor.zero_()
    # e = the query's first element plus what the second one makes of the key's.
    exponents = torch.arange(queries) / queries
    s.q[2 * keys :, 0, 0] = exponents.bfloat16()
    s.q[2 * keys :, 0, 1] = 1
    s.k[keys : 2 * keys, 0, 0] = -1
    s.k[keys : 2 * keys, 0, 1] = -torch.arange(keys).bfloat16() / (32 * keys)
    # Nobody sees the queries' own keys.
    s.q[..., 2], s.k[2 * keys :, 0, 2] = 200, -1
    s.v[:keys] = 1
    s.v[keys : 2 * keys] = -1 - torch.arange(64).bfloat16() / 64
    scale = float(np.log(2))
    store = Store([True], 64, requests=1, max_tokens=length, dtype=torch.bfloat16, seed=29)
    serve(store, [s], lambda left: left, scale)
    exact = dense_attention(s.q, s.k, s.v, [True], 20, 75, scale)[2 * keys :, 0]
    error = torch.cat(s.outputs)[2 * keys :, 0].double() - exact
    nearest = exact.abs().argmin(-1, keepdim=True)
    assert exact.gather(-1, nearest).abs().max() < 2**-6
    # Weights are within 2 ** -13.7, outputs to 2 ** -15; the rounding of 64 weights is 2 ** -12.
    assert error.gather(-1, nearest).abs().max() < 2**-11.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_size", [16, 48, 80, 160])
def test_heads_of_any_multiple_of_16(head_size, dtype):
    """Vectors of 16 lanes leave half of a chunk's last elements empty."""
    scale = head_size**-0.5
    store = Store(MASKS["mixed"], head_size, requests=2, max_tokens=200, dtype=dtype, seed=30)
    sequences = make_sequences([200, 61], 4, 3, head_size, dtype, seed=31)
    serve(
        store,
        sequences,
        lambda left: min(left, 60 if left > 10 else 3),
        scale,
        decode_up_to=3,
        layouts=[fused] * 4,
    )
    assert_rule_holds(sequences, MASKS["mixed"], 20, 75, scale)
    store.assert_guards()


@pytest.mark.parametrize("key", MEMORY_LAYOUTS)
@pytest.mark.parametrize("value", MEMORY_LAYOUTS)
def test_each_tensor_has_its_own_strides(key, value):
    store = Store(MASKS["mixed"], 32, requests=2, max_tokens=200, seed=19)
    sequences = make_sequences([200, 61], 4, 2, 32, torch.float32, seed=20)
    serve(
        store,
        sequences,
        lambda left: min(left, 60 if left > 10 else 3),
        32**-0.5,
        decode_up_to=3,
        layouts=(value, key, value, key),
    )
    assert_rule_holds(sequences, MASKS["mixed"], 20, 75, 32**-0.5)
    store.assert_guards()


@pytest.mark.parametrize(
    ("sink", "recent"), [(0, 1), (0, 16), (16, 16), (17, 1), (64, 256), (5, 8)]
)
def test_sink_and_recent_across_block_edges(sink, recent):
    store = Store(
        MASKS["mixed"],
        32,
        requests=2,
        max_tokens=400,
        sink_size=sink,
        recent_size=recent,
        seed=4,
    )
    sequences = make_sequences([400, 37], 4, 2, 32, torch.float32, seed=5)
    serve(store, sequences, lambda left: min(left, 45), 32**-0.5)
    assert_rule_holds(sequences, MASKS["mixed"], sink, recent, 32**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_see_nothing_of_the_first_tiles(dtype):
    """Without a sink, and in one block with rows that do see some of their keys."""
    store = Store(
        MASKS["mixed"],
        32,
        requests=1,
        max_tokens=700,
        sink_size=0,
        recent_size=5,
        dtype=dtype,
        seed=36,
    )
    sequences = make_sequences([700], 4, 1, 32, dtype, seed=37)
    serve(store, sequences, lambda left: left, 32**-0.5)
    assert_rule_holds(sequences, MASKS["mixed"], 0, 5, 32**-0.5)


@pytest.mark.parametrize("wrong", [(19, 75), (21, 75), (20, 74), (20, 76)])
def test_the_oracle_sees_one_token_of_difference(wrong):
    store = Store(
        MASKS["mixed"],
        32,
        requests=1,
        max_tokens=300,
        sink_size=wrong[0],
        recent_size=wrong[1],
        seed=6,
    )
    sequences = make_sequences([300], 4, 2, 32, torch.float32, seed=7)
    serve(store, sequences, lambda left: min(left, 64), 32**-0.5)
    with pytest.raises(AssertionError):
        assert_rule_holds(sequences, MASKS["mixed"], 20, 75, 32**-0.5)


def test_queries_of_several_tokens_decode_with_draft_slack():
    store = Store(
        MASKS["mixed"],
        32,
        requests=3,
        max_tokens=260,
        draft_size=4,
        seed=8,
    )
    sequences = make_sequences([260, 155, 40], 4, 2, 32, torch.float32, seed=9)
    serve(store, sequences, lambda left: min(left, 5), 32**-0.5, decode_up_to=5)
    assert_rule_holds(sequences, MASKS["mixed"], 20, 75, 32**-0.5)


def test_rolled_back_drafts_leave_no_trace():
    """Five draft tokens are written, rejected and overwritten by the true ones."""
    store = Store(
        MASKS["mixed"],
        32,
        requests=1,
        max_tokens=260,
        draft_size=5,
        seed=10,
    )
    (true,) = make_sequences([260], 4, 2, 32, torch.float32, seed=11)
    (draft,) = make_sequences([260], 4, 2, 32, torch.float32, seed=12)
    while true.done < 255:
        draft.done = true.done
        run_step(store, [draft], [6], 32**-0.5, decode_up_to=6)
        run_step(store, [true], [1], 32**-0.5)
    true.q, true.k, true.v = true.q[:255], true.k[:255], true.v[:255]
    assert_rule_holds([true], MASKS["mixed"], 20, 75, 32**-0.5)


@pytest.mark.parametrize("recent", [3, 75])
def test_accepted_drafts_stay_and_rejected_ones_leave_no_trace(recent):
    """Two of six tokens are right: a chunk longer than the span must keep what a roll-back needs."""
    store = Store(
        MASKS["mixed"], 32, requests=1, max_tokens=260, recent_size=recent, draft_size=5, seed=21
    )
    (true,) = make_sequences([260], 4, 2, 32, torch.float32, seed=22)
    (wrong,) = make_sequences([260], 4, 2, 32, torch.float32, seed=23)
    while true.done < 250:
        accepted = true.done + 2
        mixed = Sequence(
            *(
                torch.cat([getattr(true, n)[:accepted], getattr(wrong, n)[accepted:]])
                for n in "qkv"
            ),
            done=true.done,
        )
        run_step(store, [mixed], [6], 32**-0.5, decode_up_to=6)
        true.outputs.append(mixed.outputs[0][:2])
        true.done = accepted
    true.q, true.k, true.v = true.q[:250], true.k[:250], true.v[:250]
    assert_rule_holds([true], MASKS["mixed"], 20, recent, 32**-0.5)


def serve_drafts(
    draft_size, slack, recent, seed, *, layer=False, kept=lambda sequences: sequences, **settings
):
    """Steps of a token and ``draft_size`` drafts, any number of which is accepted; ends checked.

    Of the keys and values a cache keeps ``kept``.
    """
    tokens = 200
    rng = np.random.default_rng(seed)
    store = Store(
        MASKS["mixed"],
        32,
        requests=2,
        max_tokens=tokens,
        recent_size=recent,
        draft_size=slack,
        seed=seed,
        **settings,
    )
    true = make_sequences([tokens, tokens], 4, 2, 32, torch.float32, seed)
    wrong = make_sequences([tokens, tokens], 4, 2, 32, torch.float32, seed + 1)
    end = tokens - draft_size - 1
    while any(sequence.done < end for sequence in true):
        accepted = [s.done + 1 + int(rng.integers(0, draft_size + 1)) for s in true]
        mixed = [
            Sequence(
                *(torch.cat([getattr(t, n)[:stop], getattr(w, n)[stop:]]) for n in "qkv"),
                done=t.done,
            )
            for t, w, stop in zip(true, wrong, accepted, strict=True)
        ]
        chunks = [1 + draft_size if sequence.done < end else 0 for sequence in true]
        # Beyond what ``decode`` takes the step is a prefill's.
        run_step(store, mixed, chunks, 32**-0.5, decode_up_to=8, one_call=layer)
        for sequence, served, stop, chunk in zip(true, mixed, accepted, chunks, strict=True):
            if chunk:
                sequence.outputs.append(served.outputs[0][: stop - sequence.done])
                sequence.done = stop
    for sequence in true:
        for name in "qkv":
            setattr(sequence, name, getattr(sequence, name)[: sequence.done])
    assert_rule_holds(kept(true), MASKS["mixed"], 20, recent, 32**-0.5)
    store.assert_guards()


@pytest.mark.parametrize("recent", [1, 3, 33, 75])
@pytest.mark.parametrize("draft_size", [1, 4, 7, 8, 12])
def test_any_drafts_may_be_accepted_at_any_place_of_the_ring(draft_size, recent):
    serve_drafts(draft_size, draft_size, recent, seed=draft_size + recent, layer=recent == 33)


@pytest.mark.parametrize("slack", [0, 3])
def test_the_oracle_sees_a_ring_without_slack_for_its_drafts(slack):
    with pytest.raises(AssertionError):
        serve_drafts(5, slack, 33, seed=5)


@settings(max_examples=40, deadline=None)
@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=4),
    group=st.integers(1, 4),
    block=st.sampled_from([8, 16, 24]),
    ring_block=st.sampled_from([1, 4, 8, 24]),
    sink=st.integers(0, 50),
    recent=st.integers(1, 60),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_random_schedules(mask, group, block, ring_block, sink, recent, lengths, seed):
    """Random chunks, empty requests among them, in every step."""
    rng = np.random.default_rng(seed)
    store = Store(
        mask,
        16,
        requests=len(lengths),
        max_tokens=150,
        block_size=block,
        streaming_block_size=ring_block,
        sink_size=sink,
        recent_size=recent,
        seed=seed,
    )
    sequences = make_sequences(lengths, len(mask), group, 16, torch.float32, seed)
    serve(store, sequences, lambda left: min(left, int(rng.integers(0, 70))), 0.25)
    assert_rule_holds(sequences, mask, sink, recent, 0.25)
    store.assert_guards()


@pytest.mark.parametrize(("sink", "recent"), [(1000, 16), (16, 1000), (1000, 1000)])
def test_sizes_beyond_the_request_are_full_attention(sink, recent, monkeypatch):
    """Also with the smallest pieces, so that every loop over pieces turns more than once."""
    monkeypatch.setattr(pieces, "GATHER_ELEMENTS", 1)
    store = Store(
        MASKS["mixed"],
        32,
        requests=2,
        max_tokens=200,
        sink_size=sink,
        recent_size=recent,
        seed=17,
    )
    sequences = make_sequences([200, 61], 4, 2, 32, torch.float32, seed=18)
    serve(store, sequences, lambda left: min(left, 60), 32**-0.5)
    assert_rule_holds(sequences, [True] * 4, 0, 1, 32**-0.5)


def test_cache_copies_are_exact():
    """What write_kv stores is bit for bit the key and value of the last token in each slot."""
    store = Store(
        MASKS["mixed"],
        16,
        requests=1,
        max_tokens=100,
        sink_size=5,
        recent_size=11,
        seed=13,
    )
    (s,) = make_sequences([100], 4, 1, 16, torch.float32, seed=14)
    serve(store, [s], lambda left: min(left, 30), 0.25)
    for position in range(100):
        block, offset = divmod(position, 16)
        held = store.caches.retrieval[store.paged.block_table[0, block], :, offset]
        assert torch.equal(held, torch.cat([s.k, s.v], -1)[position, [0, 2]])
    for position in [*range(5), *range(89, 100)]:
        column, offset = store.ring.table_slots(np.array(position))
        held = store.caches.streaming[store.ring.block_table[0, int(column)], :, int(offset)]
        assert torch.equal(held, torch.cat([s.k, s.v], -1)[position, [1, 3]])


def test_wrong_shapes_are_named():
    store = Store(
        MASKS["mixed"],
        16,
        requests=1,
        max_tokens=20,
        sink_size=5,
        recent_size=11,
        seed=15,
    )
    (s,) = make_sequences([20], 3, 1, 16, torch.float32, seed=16)
    with pytest.raises(ValueError, match="key has 3 KV heads, the head map 4"):
        run_step(store, [s], [20], 0.25)
