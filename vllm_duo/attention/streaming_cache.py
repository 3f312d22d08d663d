"""The second cache of a layer that has both classes of heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend

    from vllm_duo.kv_cache.spec import StreamingSpec

SUFFIX = ".duo_stream"


class StreamingCache(AttentionLayerBase):
    """Holds the streaming cache of the layer whose name it carries, with ``SUFFIX`` behind.

    vLLM keeps one cache per layer name, so the sibling stands in its static forward context beside
    the layer itself and never runs.

    Args:
        backend: the layer's backend.
        num_heads: query heads of the layer, by which vLLM shares metadata builders.
        make_spec: the cache's spec, once vLLM's config is complete.
    """

    def __init__(
        self,
        backend: type[AttentionBackend],
        num_heads: int,
        make_spec: Callable[[VllmConfig], StreamingSpec],
    ) -> None:
        self.backend = backend
        self.num_heads = num_heads
        self.make_spec = make_spec
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The layer's backend."""
        return self.backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> StreamingSpec:
        """The streaming heads' spec."""
        return self.make_spec(vllm_config)
