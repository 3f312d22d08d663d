"""Streaming attention through torch's flex_attention, which skips what its block mask rules out."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

if TYPE_CHECKING:
    from vllm_duo.identify.attention import StreamingRule


def flex_streaming(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, rule: StreamingRule
) -> Tensor:
    """Attention under the rule: query, key and value [B, Hq, T, D] -> [B, Hq, T, D].

    Compiled on a GPU; elsewhere torch's own uncompiled form, which is right but not sparse.

    Raises:
        NotImplementedError: gradients are asked for where torch has no backward pass (CPUs).
    """
    if query.device.type != "cuda" and torch.is_grad_enabled() and query.requires_grad:
        raise NotImplementedError(
            "kernel flex has no backward pass on a CPU: use kernel sdpa, which is block-sparse too"
        )
    mask = _block_mask(rule.sink_size, rule.recent_size, query.shape[2], str(query.device))
    attend = _compiled() if query.device.type == "cuda" else flex_attention
    output: Tensor = attend(query, key, value, block_mask=mask, scale=scaling)
    return output


@functools.lru_cache(maxsize=64)
def _block_mask(sink: int, recent: int, length: int, device: str) -> Any:
    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & ((j < sink) | (j > i - recent))

    return create_block_mask(visible, None, None, length, length, device=device)


@functools.lru_cache(maxsize=1)
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
