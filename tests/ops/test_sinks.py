"""Learned sinks: one logit a query head that takes part in the softmax like a key without a value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.ops.oracle import SINKS, Store, make_sinks, run_step
from tests.ops.test_attention import MASKS, assert_rule_holds, make_sequences, serve
from vllm_duo.ops.batch import Batch
from vllm_duo.ops.layer import attend_and_write

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_KIND = pytest.mark.parametrize("kind", SINKS)
GROUP = 4
HEADS = 4 * GROUP


def served(lengths, sinks, chunk_of, dtype=torch.float32, recent=75, scale=0.125, **settings):
    """Sequences of ``lengths`` tokens with their outputs; both classes, heads of 64."""
    store = Store(
        MASKS["mixed"],
        64,
        requests=len(lengths),
        max_tokens=max(lengths),
        recent_size=recent,
        dtype=dtype,
        seed=70,
        sinks=sinks,
    )
    sequences = make_sequences(lengths, 4, GROUP, 64, dtype, seed=71)
    serve(store, sequences, chunk_of, scale, **settings)
    store.assert_guards()
    return sequences


@BY_KIND
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [5, 63, 1000])
def test_result_is_the_rule(kind, dtype, chunk):
    sinks = make_sinks(kind, HEADS)
    sequences = served(
        [1, 63, 200], sinks, lambda left: min(left, chunk), dtype=dtype, decode_up_to=8
    )
    assert_rule_holds(sequences, MASKS["mixed"], 20, 75, 0.125, sinks)


@pytest.mark.parametrize(("kind", "drafts"), [("ordinary", 1), ("extreme", 1), ("ordinary", 5)])
def test_a_sink_enters_once_however_many_parts_are_merged(kind, drafts):
    """One and three items of the work queue, two of the streaming head; one token and drafts."""
    sinks = make_sinks(kind, 6)
    mask = [True, False]
    store = Store(mask, 32, requests=2, max_tokens=1100, recent_size=560, seed=75, sinks=sinks)
    sequences = make_sequences([1100, 90], 2, 3, 32, torch.float32, seed=76)
    serve(
        store,
        sequences,
        lambda left: min(left, drafts) if left <= 8 else min(left - 8, 700),
        0.2,
        decode_up_to=drafts,
    )
    assert_rule_holds(sequences, mask, 20, 560, 0.2, sinks)


@pytest.mark.parametrize("scale", [-0.125, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_are_not_scaled(scale, dtype):
    sinks = make_sinks("ordinary", HEADS)
    sequences = served([150], sinks, lambda left: min(left, 70), dtype=dtype, scale=scale)
    assert_rule_holds(sequences, MASKS["mixed"], 20, 75, scale, sinks)


def test_the_oracle_sees_the_sinks_of_other_heads():
    sinks = make_sinks("ordinary", HEADS)
    sequences = served([150], sinks, lambda left: min(left, 70))
    for other in (sinks.roll(1), sinks.view(4, GROUP).T.flatten(), sinks + 0.01, None):
        with pytest.raises(AssertionError):
            assert_rule_holds(sequences, MASKS["mixed"], 20, 75, 0.125, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_of_minus_infinity_are_none(dtype):
    """Bit for bit: where there is no sink nothing is computed otherwise."""

    def outputs(sinks):
        return torch.cat(
            served(
                [700],
                sinks,
                lambda left: 1 if left <= 3 else min(left - 3, 300),
                dtype=dtype,
                recent=650,
            )[0].outputs
        )

    assert torch.equal(outputs(torch.full((HEADS,), -torch.inf)), outputs(None))


def test_a_sink_that_is_not_a_number_shows():
    sinks = torch.zeros(HEADS)
    sinks[5] = torch.nan
    (sequence,) = served([20], sinks, lambda left: 1 if left <= 3 else left - 3)
    wrong = torch.cat(sequence.outputs).isnan()
    assert wrong[:, 5].all()
    assert wrong.any(dim=(0, 2)).sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_does_not_depend_on_the_batch_or_on_threads(dtype, implementation):
    """Bit for bit: contexts of one part, of two and of four; chunks decoded and prefilled."""
    if implementation == "reference":
        pytest.skip("the references cut their work by the batch")
    contexts, chunks = [30, 600, 1700, 900, 44], [1, 1, 4, 60, 130]
    sinks = make_sinks("ordinary", HEADS)
    store = Store(
        MASKS["mixed"],
        64,
        requests=5,
        max_tokens=1800,
        recent_size=700,
        dtype=dtype,
        seed=72,
        draft_size=3,
        sinks=sinks,
    )
    sequences = make_sequences(
        [sum(pair) for pair in zip(contexts, chunks, strict=True)], 4, GROUP, 64, dtype, seed=73
    )
    run_step(store, sequences, contexts, 0.125)
    for cache in (store.caches.retrieval, store.caches.streaming):
        cache.nan_to_num_(0.0)

    def outputs(rows):
        """Of a step of these requests; their caches are put back afterwards."""
        caches = store.caches.retrieval.clone(), store.caches.streaming.clone()
        picked = [sequences[i] for i in rows]
        for s in picked:
            s.outputs.clear()
        run_step(
            store,
            picked,
            [chunks[i] for i in rows],
            0.125,
            decode_up_to=8,
            rows=rows,
            one_call=True,
        )
        for s, i in zip(picked, rows, strict=True):
            s.done = contexts[i]
        store.caches.retrieval.copy_(caches[0])
        store.caches.streaming.copy_(caches[1])
        return {i: s.outputs[0] for s, i in zip(picked, rows, strict=True)}

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [outputs([i])[i] for i in range(5)]
        for threads, rows in ((1, [0, 1, 2, 3, 4]), (2, [4, 2, 3, 0]), (3, [1, 3, 2])):
            torch.set_num_threads(threads)
            together = outputs(rows)
            for i in rows:
                assert torch.equal(together[i], alone[i])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "sinks",
    [torch.zeros(3), torch.zeros(2, 2), torch.zeros(4).bfloat16(), torch.zeros(8)[::2]],
    ids=["short", "two dimensions", "bf16", "strided"],
)
def test_wrong_sinks_are_named(sinks):
    store = Store([True, False], 16, requests=1, max_tokens=20, seed=74)
    q, k, v = (torch.zeros(5, heads, 16) for heads in (4, 2, 2))
    batch = Batch.from_host(np.array([0, 5]), np.array([5]), 0)
    with pytest.raises(ValueError, match=r"sinks must be \[4\] float32.*convert them once"):
        attend_and_write(
            q, k, v, store.heads, store.caches, batch, 1.0, torch.empty_like(q), sinks=sinks
        )
