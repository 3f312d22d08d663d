r"""Echo and induction scores on repeated random tokens.

Source: RazorAttention, arXiv:2407.15891, section 3.2.

K random tokens stand four times in a row, so that nothing but the repetition tells what comes. For a
query at position i in the second to fourth repeat, the echo tokens are the earlier copies of the
token at i, E(i) = {i - mK}, and the induction tokens those that follow them, {i - mK + 1}, m >= 1.
With attention weights a [T, T] of a head

    echo score      = mean over i of sum_{j in E(i)} a[i, j]
    induction score = mean over i of sum_{j in E(i)} a[i, j + 1]           [L, Hq] each, in [0, 1].

Retrieval heads are the `induction_share` (14 %) of heads with the highest induction score and the
`echo_share` (1 %) with the highest echo score.

A pattern needs an order of all heads, which the paper does not give. Chosen here: heads come in as
both shares grow in proportion, so the paper's set comes out exactly where their union is cut; the
value of the n-th of N heads is 1 - n / N, n from 0. The scores themselves are saved beside it.

Left open by the paper and chosen here:
- K is a quarter of max_length and must exceed what streaming heads keep, else a copy is in sight;
- tokens are drawn evenly from the vocabulary without special tokens; one beginning-of-text token
  stands before them where the tokenizer has one;
- sums run over all earlier copies; scores are averaged over samples;
- what a learned sink gets is on no token and counts for neither score;
- KV heads: `gqa`, max or mean over the group's query heads, before heads are ordered.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from vllm_duo.identify.attention import Softmax, attention_rows, full_attention
from vllm_duo.identify.methods import (
    INDUCTION_REPEATS,
    Floats,
    Job,
    Scores,
    by_layer,
    kept_tokens,
    to_kv_heads,
)
from vllm_duo.identify.refusals import text_of

ROWS_AT_ONCE = 256


class Induction:
    """See the module."""

    name = "induction"
    default_samples = 4

    @torch.no_grad()
    def score(self, job: Job, index: int) -> Floats:
        """[2, L, Hq] of one sample: echo and induction."""
        ids, period = make_repeats(job, index)
        first = ids.shape[1] - INDUCTION_REPEATS * period
        found: dict[int, Tensor] = {}

        def look(layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
            found[layer] = copy_attention(query, key, softmax, first, period)
            return full_attention(query, key, value, softmax)

        job.model.hidden(ids, look)
        layers = by_layer(found, job.model.info.num_layers)  # [L, 2, Hq]
        return layers.transpose(0, 1).double().cpu().numpy()

    def combine(self, job: Job, scores: Floats) -> Scores:
        """Mean over the samples, KV heads, then the order of the heads."""
        settings, heads = job.settings, job.model.info.num_kv_heads
        echo, induction = scores.mean(axis=0)
        values = order_heads(
            to_kv_heads(echo, heads, settings.gqa),
            to_kv_heads(induction, heads, settings.gqa),
            echo_share=settings.echo_share,
            induction_share=settings.induction_share,
        )
        return Scores(values, {}, {"echo_score": echo, "induction_score": induction})


def make_repeats(job: Job, index: int) -> tuple[Tensor, int]:
    """Token ids [1, T] of one sample, and the period of its repeats in tokens.

    Raises:
        ValueError: max_length is too short for copies that streaming heads do not see.
    """
    settings, tokenizer = job.settings, job.model.tokenizer
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    longest = job.lengths()[1]
    period = (longest - len(begin)) // INDUCTION_REPEATS
    if longest < job.least_length:
        raise ValueError(
            f"method induction repeats {period} tokens {INDUCTION_REPEATS} times within --max-length "
            f"{longest}, and a copy must lie further back than the {kept_tokens(settings, job.model)} "
            "tokens that a streaming head or a layer of the model's own keeps: expected --max-length "
            f"of at least {job.least_length}"
        )
    rng = random.Random(f"{settings.seed} induction {index}")
    special = set(tokenizer.all_special_ids)
    size = min(len(tokenizer), text_of(job.model.model.config).vocab_size)
    allowed = [token for token in range(size) if token not in special]
    block = [rng.choice(allowed) for _ in range(period)]
    return torch.tensor([begin + block * INDUCTION_REPEATS]), period


def copy_attention(query: Tensor, key: Tensor, softmax: Softmax, first: int, period: int) -> Tensor:
    """Echo and induction score of every query head: [2, Hq].

    Args:
        query: [1, Hq, T, D].
        key: [1, Hkv, T, D].
        softmax: of the layer.
        first: position of the first random token.
        period: tokens until they repeat.
    """
    length = query.shape[2]
    sums = torch.zeros(2, query.shape[1], dtype=torch.float64, device=query.device)
    for start in range(first + period, length, ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + ROWS_AT_ONCE, length), device=query.device)
        weights = attention_rows(query, key, softmax, rows)  # [Hq, n, T]
        for repeat in range(1, INDUCTION_REPEATS):
            copies = rows - repeat * period
            there = copies >= first
            at = torch.nonzero(there).flatten()
            sums[0] += weights[:, at, copies[there]].sum(-1)
            sums[1] += weights[:, at, copies[there] + 1].sum(-1)
    return sums / (length - first - period)


def order_heads(
    echo: Floats, induction: Floats, *, echo_share: float, induction_share: float
) -> Floats:
    """Values that rank heads as the paper's two shares take them in, [L, Hkv] each.

    A head's place is the smaller of its rank by induction score over `induction_share` and its rank
    by echo score over `echo_share`: how far both shares must grow, together, until one takes it in.
    """
    places = _ranks(induction) / induction_share
    if echo_share > 0.0:
        places = np.minimum(places, _ranks(echo) / echo_share)
    size = places.size
    order = np.lexsort((np.arange(size), -induction.ravel(), places.ravel()))
    values = np.empty(size)
    values[order] = 1.0 - np.arange(size) / size
    return values.reshape(places.shape)


def _ranks(scores: Floats) -> Floats:
    """1 for the highest; among equal scores the lower layer, then the lower head, comes first."""
    order = np.argsort(-scores.ravel(), kind="stable")
    ranks = np.empty(scores.size)
    ranks[order] = np.arange(1, scores.size + 1)
    return ranks.reshape(scores.shape)
