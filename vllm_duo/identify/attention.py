"""Attention under the streaming rule, hooked into transformers models through AttentionInterface.

Letters: B samples, Hq query heads, Hkv KV heads, T tokens, D head size. The rule: for a query at
position i, key j is visible iff j <= i, and in a streaming head also j < sink_size or
j > i - recent_size.

Source: transformers' attention registry, `transformers.AttentionInterface`; DuoAttention,
arXiv:2410.10819, section 2.2 for the gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from vllm_duo.windows import Windows

IMPLEMENTATION = "vllm_duo_identify"
"""The name under which the hook stands in transformers' registry."""

_HOOK_ATTRIBUTE = "_vllm_duo_hook"

Policy = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""(layer, query [B, Hq, T, D], key and value [B, Hkv, T, D], scaling) -> output [B, Hq, T, D]."""


@dataclass(frozen=True)
class StreamingRule:
    """What streaming heads keep, in tokens, and which kernel computes it."""

    sink_size: int
    recent_size: int
    kernel: Literal["sdpa", "flex"] = "sdpa"


@dataclass(eq=False)
class AttentionHook:
    """Stands in for the attention of every layer of one model.

    Attributes:
        policy: what the layers compute at the moment.
        windows: the model's own sliding windows by layer; empty: none. A layer with one computes the
            model's own attention and never the policy.
        layers: the number of each attention module, in the order in which they first ran.
    """

    policy: Policy
    windows: Windows = ()
    layers: dict[nn.Module, int] = field(default_factory=dict)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """What the module's layer computes: [B, Hq, T, D]."""
        layer = self.layers.setdefault(module, len(self.layers))
        window = self.windows[layer] if self.windows else None
        if window is not None:
            return streaming_attention(query, key, value, scaling, StreamingRule(0, window))
        return self.policy(layer, query, key, value, scaling)

    def install(self, model: nn.Module) -> None:
        """Become the hook of every module of `model`; its attention modules announce themselves."""
        for module in model.modules():
            module.__dict__[_HOOK_ATTRIBUTE] = self

    @contextmanager
    def using(self, policy: Policy) -> Iterator[None]:
        """Compute `policy` inside the context, whose backward passes included."""
        before, self.policy = self.policy, policy
        try:
            yield
        finally:
            self.policy = before


def _hooked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """The registry's signature. Masks are ours: samples are causal and padded at their end only."""
    hook: AttentionHook = module.__dict__[_HOOK_ATTRIBUTE]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = hook.attend(module, query, key, value, scale)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _hooked_attention)


def full_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention of the last n positions.

    Args:
        query: [B, Hq, n, D].
        key: [B, Hkv, T, D]; value alike.
        value: see key.
        scaling: factor of the logits.

    Returns:
        [B, Hq, n, D].
    """
    key, value = _per_query_head(query, key), _per_query_head(query, value)
    asked, length = query.shape[2], key.shape[2]
    if asked == length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    positions = torch.arange(length, device=query.device)
    visible = positions <= positions[length - asked :, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)


def streaming_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, rule: StreamingRule
) -> Tensor:
    """Attention under the rule, by blocks of queries: time and memory grow with T, not with T * T.

    Args:
        query: [B, Hq, n, D], of the last n positions.
        key: [B, Hkv, T, D]; value alike.
        value: see key.
        scaling: factor of the logits.
        rule: what is kept.

    Returns:
        [B, Hq, n, D].
    """
    length = key.shape[2]
    before = length - query.shape[2]
    sink, recent = rule.sink_size, rule.recent_size
    if length <= sink + recent:  # nothing is dropped yet
        return full_attention(query, key, value, scaling)
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


def full_policy(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """The model as it is: a `Policy`."""
    return full_attention(query, key, value, scaling)


@dataclass(frozen=True)
class ClassPolicy:
    """Hard classes: each head is computed once, in its own class.

    Attributes:
        retrieval: [L, Hkv] bool on any device; False streams.
        rule: what streaming heads keep.
    """

    retrieval: Tensor
    rule: StreamingRule

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """A `Policy`."""
        kept = self.retrieval[layer].to(query.device)  # [Hkv]
        if bool(kept.all()):
            return full_attention(query, key, value, scaling)
        if not bool(kept.any()):
            return streaming_attention(query, key, value, scaling, self.rule)
        queries = kept.repeat_interleave(query.shape[1] // key.shape[1])  # [Hq]
        output = torch.empty_like(query)
        output[:, queries] = full_attention(
            query[:, queries], key[:, kept], value[:, kept], scaling
        )
        output[:, ~queries] = streaming_attention(
            query[:, ~queries], key[:, ~kept], value[:, ~kept], scaling, self.rule
        )
        return output


@dataclass(frozen=True)
class GatedPolicy:
    """alpha * full + (1 - alpha) * streaming, one alpha a KV head.

    Attributes:
        gates: [L, Hkv] float32, may require gradients.
        rule: what streaming heads keep.
    """

    gates: Tensor
    rule: StreamingRule

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """A `Policy`."""
        group = query.shape[1] // key.shape[1]
        alpha = self.gates[layer].repeat_interleave(group)[:, None, None].to(query.dtype)
        full = full_attention(query, key, value, scaling)
        streaming = streaming_attention(query, key, value, scaling, self.rule)
        return alpha * full + (1 - alpha) * streaming


@dataclass(frozen=True)
class LastRowsPolicy:
    """Another policy, without what nobody looks at: the last layer before the first position asked for.

    Their output there is 0. Nothing after the last attention mixes positions.

    Attributes:
        policy: of all layers.
        last: number of the last layer.
        first: the first position that is asked for.
    """

    policy: Policy
    last: int
    first: int

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """A `Policy`."""
        if layer != self.last:
            return self.policy(layer, query, key, value, scaling)
        output = self.policy(layer, query[:, :, self.first :], key, value, scaling)
        return F.pad(output, (0, 0, self.first, 0))


def attention_rows(
    query: Tensor, key: Tensor, scaling: float, rows: Tensor, rule: StreamingRule | None = None
) -> Tensor:
    """Attention weights of some queries of one sample, in float32.

    Args:
        query: [1, Hq, T, D].
        key: [1, Hkv, T, D].
        scaling: factor of the logits.
        rows: [n] int64 positions of the queries.
        rule: what the heads keep; None keeps all.

    Returns:
        [Hq, n, T]; each row sums to 1.
    """
    key = _per_query_head(query, key)[0].float()
    logits = query[0][:, rows].float() @ key.mT * scaling
    positions = torch.arange(key.shape[1], device=key.device)
    hidden = positions > rows[:, None]
    if rule is not None:
        hidden |= (positions >= rule.sink_size) & (positions <= rows[:, None] - rule.recent_size)
    return logits.masked_fill(hidden, -torch.inf).softmax(-1)


def _per_query_head(query: Tensor, x: Tensor) -> Tensor:
    group = query.shape[1] // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _take(x: Tensor, sink: int, first: int, end: int) -> Tensor:
    """Sink and recent part of [B, H, T, D] along the tokens."""
    if first <= sink:
        return x[:, :, :end]
    return torch.cat((x[:, :, :sink], x[:, :, first:end]), dim=2)
