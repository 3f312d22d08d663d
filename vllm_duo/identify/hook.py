"""Stands in for a transformers model's attention, through AttentionInterface.

Source: transformers' attention registry, `transformers.AttentionInterface`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from vllm_duo.identify.attention import Softmax, StreamingRule, streaming_attention
from vllm_duo.identify.policies import Policy
from vllm_duo.windows import Windows

IMPLEMENTATION = "vllm_duo_identify"
"""The name under which the hook stands in transformers' registry."""

_HOOK_ATTRIBUTE = "_vllm_duo_hook"


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
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax
    ) -> Tensor:
        """What the module's layer computes: [B, Hq, T, D]."""
        layer = self.layers.setdefault(module, len(self.layers))
        window = self.windows[layer] if self.windows else None
        if window is not None:
            return streaming_attention(query, key, value, softmax, StreamingRule(0, window))
        return self.policy(layer, query, key, value, softmax)

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
    s_aux: Tensor | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """The registry's signature. Masks are ours: samples are causal and padded at their end only.

    `s_aux` are learned sinks, [Hq].
    """
    hook: AttentionHook = module.__dict__[_HOOK_ATTRIBUTE]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = hook.attend(module, query, key, value, Softmax(scale, s_aux))
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _hooked_attention)
