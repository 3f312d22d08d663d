r"""Attention under the streaming rule, in PyTorch.

Letters: B samples, Hq query heads, Hkv KV heads, T tokens, D head size. The rule: for a query at
position i, key j is visible iff j <= i, and in a streaming head also j < sink_size or
j > i - recent_size.

Some models have learned sinks: a query head's logit s that takes part in the softmax beside the keys
that the query sees, without a value. Its weights are exp(x_j) / (exp(s) + sum_j exp(x_j)). That is
attention with one more key, before all others, whose logit is s and whose value is 0: every query of
either class sees it, and all other positions move up by one.

Source: docs/design.md for the rule; for learned sinks transformers' gpt-oss, `eager_attention_forward`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

KEY_MULTIPLE = 8
"""Head sizes that the fast attention kernels of GPUs take are multiples of it."""


@dataclass(frozen=True)
class StreamingRule:
    """What streaming heads keep, in tokens, and which kernel computes it."""

    sink_size: int
    recent_size: int
    kernel: Literal["sdpa", "flex"] = "sdpa"


@dataclass(frozen=True, eq=False)
class Softmax:
    """How a layer makes weights of queries and keys.

    Attributes:
        scaling: factor of the logits.
        sinks: [Hq] learned sinks, in the units of scaled logits; None: the model has none.
    """

    scaling: float
    sinks: Tensor | None = None

    def of(self, heads: Tensor) -> Softmax:
        """Of some query heads: [Hq] bool."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[heads])


def full_attention(query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
    """Causal attention of the last n positions.

    Args:
        query: [B, Hq, n, D].
        key: [B, Hkv, T, D]; value alike.
        value: see key.
        softmax: of the layer.

    Returns:
        [B, Hq, n, D].
    """
    if softmax.sinks is None:
        return _full(query, key, value, softmax.scaling)
    output = _full(*_sink_before(query, key, value, softmax), softmax.scaling)
    return _without_sink(output, query)


def streaming_attention(
    query: Tensor, key: Tensor, value: Tensor, softmax: Softmax, rule: StreamingRule
) -> Tensor:
    """Attention under the rule, by blocks of queries: time and memory grow with T, not with T * T.

    Args:
        query: [B, Hq, n, D], of the last n positions.
        key: [B, Hkv, T, D]; value alike.
        value: see key.
        softmax: of the layer.
        rule: what is kept.

    Returns:
        [B, Hq, n, D].
    """
    if softmax.sinks is None:
        return _streaming(query, key, value, softmax.scaling, rule)
    rule = replace(rule, sink_size=rule.sink_size + 1)
    output = _streaming(*_sink_before(query, key, value, softmax), softmax.scaling, rule)
    return _without_sink(output, query)


def attention_rows(
    query: Tensor, key: Tensor, softmax: Softmax, rows: Tensor, rule: StreamingRule | None = None
) -> Tensor:
    """Attention weights of some queries of one sample, in float32.

    Args:
        query: [1, Hq, T, D].
        key: [1, Hkv, T, D].
        softmax: of the layer.
        rows: [n] int64 positions of the queries.
        rule: what the heads keep; None keeps all.

    Returns:
        [Hq, n, T]; each row and its learned sink, where there is one, sum to 1.
    """
    key = _per_query_head(query, key)[0].float()
    logits = query[0][:, rows].float() @ key.mT * softmax.scaling
    positions = torch.arange(key.shape[1], device=key.device)
    hidden = positions > rows[:, None]
    if rule is not None:
        hidden |= (positions >= rule.sink_size) & (positions <= rows[:, None] - rule.recent_size)
    logits = logits.masked_fill(hidden, -torch.inf)
    if softmax.sinks is None:
        return logits.softmax(-1)
    sinks = softmax.sinks.float()[:, None, None].expand(*logits.shape[:2], 1)
    return torch.cat((logits, sinks), dim=-1).softmax(-1)[..., :-1]


def _full(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    key, value = _per_query_head(query, key), _per_query_head(query, value)
    asked, length = query.shape[2], key.shape[2]
    if asked == length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    positions = torch.arange(length, device=query.device)
    visible = positions <= positions[length - asked :, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)


def _streaming(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, rule: StreamingRule
) -> Tensor:
    length = key.shape[2]
    before = length - query.shape[2]
    sink, recent = rule.sink_size, rule.recent_size
    if length <= sink + recent:  # nothing is dropped yet
        return _full(query, key, value, scaling)
    key, value = _per_query_head(query, key), _per_query_head(query, value)
    if rule.kernel == "flex" and before == 0:
        from vllm_duo.identify.flex import flex_streaming

        return flex_streaming(query, key, value, scaling, rule)
    block = min(1024, max(128, recent))
    positions = torch.arange(length, device=query.device)
    pieces = []
    for start in range(before, length, block):
        end = min(start + block, length)
        first = max(sink, start - recent + 1)  # of the recent part
        seen = torch.cat((positions[: min(sink, end)], positions[first:end]))
        rows = positions[start:end, None]
        visible = (seen <= rows) & ((seen < sink) | (seen > rows - recent))
        pieces.append(
            F.scaled_dot_product_attention(
                query[:, :, start - before : end - before],
                _take(key, sink, first, end),
                _take(value, sink, first, end),
                attn_mask=visible,
                scale=scaling,
            )
        )
    return torch.cat(pieces, dim=2)


def _sink_before(
    query: Tensor, key: Tensor, value: Tensor, softmax: Softmax
) -> tuple[Tensor, Tensor, Tensor]:
    """The same attention without learned sinks: they become a key before all others, of value 0.

    One more coordinate makes their logits: 1 in that key, 0 in the others, and in the queries of a
    head its sink over the scaling. Where all positions are asked for, a query that sees that key
    alone comes before them, so that there are as many queries as keys. See `_without_sink`.

    Returns:
        query [B, Hq, n + 1 or n, D'], key and value [B, Hkv, T + 1, D'] with D' > D.
    """
    assert softmax.sinks is not None
    size, own = query.shape[3], int(query.shape[2] == key.shape[2])
    more = KEY_MULTIPLE - size % KEY_MULTIPLE
    logits = (softmax.sinks.double() / softmax.scaling).to(query.dtype)[:, None, None]
    query = torch.cat((query, logits.expand(*query.shape[:3], 1)), dim=3)
    query = F.pad(query, (0, more - 1, own, 0))
    sink_key = F.pad(key.new_ones(1, 1, 1, 1), (size, more - 1)).expand(*key.shape[:2], -1, -1)
    key = torch.cat((sink_key, F.pad(key, (0, more))), dim=2)
    return query, key, F.pad(value, (0, more, 1, 0))


def _without_sink(output: Tensor, query: Tensor) -> Tensor:
    """What belongs to the queries as they were: [B, Hq, n, D]."""
    return output[:, :, -query.shape[2] :, : query.shape[3]]


def _per_query_head(query: Tensor, x: Tensor) -> Tensor:
    group = query.shape[1] // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _take(x: Tensor, sink: int, first: int, end: int) -> Tensor:
    """Sink and recent part of [B, H, T, D] along the tokens."""
    if first <= sink:
        return x[:, :, :end]
    return torch.cat((x[:, :, :sink], x[:, :, first:end]), dim=2)
