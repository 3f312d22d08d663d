"""What the layers of a hooked model compute: each a `Policy`.

Letters as in `attention`; L layers. Source: DuoAttention, arXiv:2410.10819, section 2.2 for the gates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_duo.identify.attention import (
    Softmax,
    StreamingRule,
    full_attention,
    streaming_attention,
)

Policy = Callable[[int, Tensor, Tensor, Tensor, Softmax], Tensor]
"""(layer, query [B, Hq, T, D], key and value [B, Hkv, T, D], softmax) -> output [B, Hq, T, D]."""


def full_policy(layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
    """The model as it is: a `Policy`."""
    return full_attention(query, key, value, softmax)


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
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax
    ) -> Tensor:
        """A `Policy`."""
        kept = self.retrieval[layer].to(query.device)  # [Hkv]
        if bool(kept.all()):
            return full_attention(query, key, value, softmax)
        if not bool(kept.any()):
            return streaming_attention(query, key, value, softmax, self.rule)
        queries = kept.repeat_interleave(query.shape[1] // key.shape[1])  # [Hq]
        output = torch.empty_like(query)
        output[:, queries] = full_attention(
            query[:, queries], key[:, kept], value[:, kept], softmax.of(queries)
        )
        output[:, ~queries] = streaming_attention(
            query[:, ~queries],
            key[:, ~kept],
            value[:, ~kept],
            softmax.of(~queries),
            self.rule,
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
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax
    ) -> Tensor:
        """A `Policy`."""
        group = query.shape[1] // key.shape[1]
        alpha = self.gates[layer].repeat_interleave(group)[:, None, None].to(query.dtype)
        full = full_attention(query, key, value, softmax)
        streaming = streaming_attention(query, key, value, softmax, self.rule)
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
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax
    ) -> Tensor:
        """A `Policy`."""
        if layer != self.last:
            return self.policy(layer, query, key, value, softmax)
        output = self.policy(layer, query[:, :, self.first :], key, value, softmax)
        return F.pad(output, (0, 0, self.first, 0))
