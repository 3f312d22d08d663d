"""The forward-only methods and `exclusive`, on attention whose scores are known."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.identify import tiny
from tests.identify.conftest import make_job
from vllm_duo.heads import HeadPattern
from vllm_duo.identify.attention import Softmax
from vllm_duo.identify.exclusive import exclusive_sparsities, make_exclusive
from vllm_duo.identify.induction import copy_attention, make_repeats, order_heads
from vllm_duo.identify.methods import to_kv_heads
from vllm_duo.identify.on_the_fly import output_change
from vllm_duo.identify.registry import FORWARD_METHODS


def steer(job, attend, sinks=None):
    """Give the model's only layer attention that `attend` computes: query head, query -> key.

    Queries are one-hot at the wanted key, keys one-hot at their own position: the logit of the wanted
    key is 50, of every other 0. The learned ``sinks`` are [Hq] logits.
    """
    original = job.model.hidden

    def hidden(ids, policy):
        length = ids.shape[1]
        key = 50.0 * torch.eye(length)[None, None].repeat(1, job.model.info.num_kv_heads, 1, 1)
        query = torch.zeros(1, job.model.info.num_heads, length, length)
        for head in range(job.model.info.num_heads):
            for position in range(length):
                query[0, head, position, attend(head, position)] = 1.0
        value = torch.eye(length)[None, None].expand_as(key)

        def steered(layer, _query, _key, _value, scaling):
            policy(layer, query, key, value, Softmax(1.0, sinks))
            return torch.zeros_like(_query)

        return original(ids, steered)

    object.__setattr__(job.model, "hidden", hidden)
    return job


@pytest.fixture
def answering(monkeypatch):
    """Every model predicts the token that comes: as if it answered right."""

    def patch(job, sample):
        ids = torch.tensor(sample.ids)

        def logits(hidden):
            rows = torch.tensor(sample.key_queries())
            return torch.nn.functional.one_hot(ids[rows + 1], len(job.model.tokenizer)).float()

        object.__setattr__(job.model, "logits", logits)

    return patch


def copying_positions(sample, shift):
    """Where a head looks that copies each key token, `shift` tokens further on."""
    (first, end), (asked, _) = sample.needle_keys[0], sample.keys[0]
    return {asked - 1 + n: first + n + shift for n in range(end - first)}


def retrieval_scores(answering, shift, match, sinks=None):
    job = make_job(tiny.copying_llama(), method="retrieval-score", needle_match=match)
    sample = job.samples().make("identify", 0)
    looks = copying_positions(sample, shift)
    steer(job, lambda head, at: looks.get(at, at) if head == 0 else at, sinks)
    answering(job, sample)
    return FORWARD_METHODS["retrieval-score"].score(job, 0)[0]


@pytest.mark.parametrize(
    ("shift", "match", "expected"),
    [
        (0, "exact", 1.0),
        (1, "exact", 0.0),
        (0, "anywhere", 1.0),
        (1, "anywhere", 1.0),
        (9, "anywhere", 0.0),
    ],
)
def test_retrieval_score_counts_what_the_strongest_attention_is_on(
    answering, shift, match, expected
):
    head, other = retrieval_scores(answering, shift, match)
    repeats = 0.6  # a key may hold the same digit twice in a row
    assert head == expected or (expected == 0.0 and match == "exact" and head < repeats)
    assert other == 0.0


@pytest.mark.parametrize(("sink", "expected"), [(49.0, 1.0), (51.0, 0.0)])
@pytest.mark.parametrize("match", ["exact", "anywhere"])
def test_a_learned_sink_that_gets_more_than_any_token_is_the_strongest(
    answering, match, sink, expected
):
    head, _ = retrieval_scores(answering, 0, match, torch.tensor([sink, sink]))
    assert head == expected


def test_what_a_learned_sink_gets_counts_for_no_copy():
    period, first, length = 20, 1, 81
    key = 50.0 * torch.eye(length)[None, None]
    query = torch.eye(length)[[max(0, at - period) for at in range(length)]][None, None]
    scores = copy_attention(query, key, Softmax(1.0, torch.tensor([50.0])), first, period)
    assert scores[:, 0].tolist() == pytest.approx([0.5, 0.0], abs=1e-6)


def test_a_token_that_the_model_does_not_generate_does_not_count():
    job = make_job(tiny.copying_llama(), method="retrieval-score")
    sample = job.samples().make("identify", 0)
    looks = copying_positions(sample, 0)
    steer(job, lambda head, at: looks.get(at, at))
    wrong = torch.zeros(len(sample.key_queries()), len(job.model.tokenizer))
    object.__setattr__(job.model, "logits", lambda hidden: wrong)
    assert FORWARD_METHODS["retrieval-score"].score(job, 0).max() == 0.0


@pytest.mark.parametrize(("back", "expected"), [(0, (1.0, 0.0)), (1, (0.0, 1.0)), (2, (0.0, 0.0))])
def test_echo_and_induction_heads_are_told_apart(back, expected):
    """Heads that look at the copy before, at the token after it, and at the one after that."""
    period, first, length = 20, 1, 81
    key = 50.0 * torch.eye(length)[None, None]
    targets = [max(0, at - period + back) if at >= first + period else at for at in range(length)]
    query = torch.eye(length)[targets][None, None]
    scores = copy_attention(query, key, Softmax(1.0), first, period)
    assert scores[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_copies_of_all_earlier_repeats_count():
    period, first, length = 20, 1, 81
    key = 50.0 * torch.eye(length)[None, None]
    query = torch.eye(length)[[first + (at - first) % period for at in range(length)]][None, None]
    assert float(copy_attention(query, key, Softmax(1.0), first, period)[0, 0]) == pytest.approx(
        1.0
    )


def test_repeats_are_four_equal_blocks_of_plain_tokens():
    job = make_job(tiny.random_llama(), method="induction")
    ids, period = make_repeats(job, 0)
    tokens = ids[0].tolist()
    assert tokens[0] == job.model.tokenizer.bos_token_id
    assert len(tokens) == 1 + 4 * period <= 96
    assert all(tokens[1 + n * period :][:period] == tokens[1 : 1 + period] for n in range(4))
    assert not set(tokens[1:]) & set(job.model.tokenizer.all_special_ids)
    assert make_repeats(job, 1)[0].tolist() != ids.tolist()


def test_repeats_within_sight_of_streaming_heads_are_refused():
    job = make_job(tiny.random_llama(), method="induction", sink_size=8, recent_size=20)
    with pytest.raises(ValueError, match=r"expected --max-length of at least 117"):
        make_repeats(job, 0)


def test_order_takes_in_the_papers_set():
    """100 heads: 14 by induction score and the first by echo score come first."""
    rng = np.random.default_rng(0)
    induction, echo = rng.random((10, 10)), rng.random((10, 10))
    values = order_heads(echo, induction, echo_share=0.01, induction_share=0.14)
    by_induction = set(np.argsort(-induction.ravel())[:14])
    union = by_induction | {int(echo.argmax())}
    chosen = set(np.argsort(-values.ravel())[: len(union)])
    assert chosen == union
    assert len(np.unique(values)) == 100


def test_a_heads_change_is_zero_when_nothing_is_dropped_and_one_when_all_is():
    value = torch.eye(4)[None, None]  # the output is the weights
    full = torch.tensor([[[1.0, 0, 0, 0]], [[0, 0, 0, 1.0]]])  # two heads, one query
    streaming = torch.tensor([[[0, 0, 0, 1.0]], [[0, 0, 0, 1.0]]])
    assert output_change(full, streaming, value).tolist() == [0.5, 0.0]
    assert output_change(full, -full, value)[0] == pytest.approx(1.0)


def test_on_the_fly_finds_the_head_that_looks_far():
    job = make_job(tiny.copying_llama(), method="on-the-fly")
    sample = job.samples().make("identify", 0)
    looks = dict.fromkeys(sample.answer_queries(), sample.needle_keys[0][0])
    steer(job, lambda head, at: looks.get(at, at) if head == 0 else at)
    far, near = FORWARD_METHODS["on-the-fly"].score(job, 0)[0]
    assert far > 0.45
    assert near < 1e-6


@pytest.mark.parametrize("name", sorted(FORWARD_METHODS))
def test_scores_lie_between_0_and_1_and_depend_on_seed_and_number(name):
    job = make_job(tiny.random_llama(), method=name)
    method = FORWARD_METHODS[name]
    scores = np.stack([method.score(job, index) for index in (0, 0, 1)])
    assert scores.shape[-2:] == (2, 4)
    assert 0.0 <= scores.min() <= scores.max() <= 1.0
    assert np.array_equal(scores[0], scores[1])
    found = method.combine(job, scores)
    assert found.values.shape == (2, 2)
    HeadPattern(found.values)
    if name != "retrieval-score":  # a random model answers nothing
        assert not np.array_equal(scores[0], scores[2])
        other = replace(job, settings=job.settings.model_copy(update={"seed": 1}))
        assert not np.array_equal(method.score(other, 0), scores[0])


def test_groups_of_query_heads_are_aggregated_by_name():
    scores = np.array([[0.1, 0.5, 0.2, 0.2]])
    assert to_kv_heads(scores, 2, "max").tolist() == [[0.5, 0.2]]
    assert to_kv_heads(scores, 2, "mean").tolist() == [[pytest.approx(0.3), pytest.approx(0.2)]]
    assert to_kv_heads(scores, 4, "max").tolist() == scores.tolist()


def test_exclusive_keeps_the_layers_that_move_the_values_least():
    values = np.array([[0.9, 0.0], [0.4, 0.6], [0.0, 0.1], [0.6, 0.5]])
    pattern = HeadPattern(make_exclusive(HeadPattern(values)).values)
    for sparsity, kept in zip(exclusive_sparsities(4), (4, 3, 2, 1, 0), strict=True):
        retrieval = pattern.select(sparsity=sparsity).retrieval
        layers = retrieval.all(axis=1)
        assert (retrieval.any(axis=1) == layers).all()  # no layer holds both
        assert int(layers.sum()) == kept  # the bytes of any pattern at this sparsity
        costs = {
            subset: sum((1 - row if n in subset else row).sum() for n, row in enumerate(values))
            for subset in _subsets(4, kept)
        }
        assert costs[tuple(np.flatnonzero(layers))] == pytest.approx(min(costs.values()))


def _subsets(size, count):
    from itertools import combinations

    return list(combinations(range(size), count))


def test_exclusive_layers_never_tie():
    values = make_exclusive(HeadPattern.uniform(5, 3)).values
    assert all(upper[0] > lower[0] for upper, lower in pairwise(values))
    assert (values == values[:, :1]).all()
