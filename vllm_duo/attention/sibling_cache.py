"""A second cache of a layer: of its streaming heads, or one that is not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend

    from vllm_duo.kv_cache.spec import RetrievalSpec, StreamingSpec

SUFFIX = ".duo_stream"
"""Follows the layer's name in that of its streaming heads' cache, where it has both classes."""

UNUSED_SUFFIX = ".duo_unused"
"""The same, with a group's index behind it, for a cache that stands in for heads of other ranks
(``kv_cache/rank_caches.py``)."""


class SiblingCache(AttentionLayerBase):
    """Holds the second cache of the layer whose name it carries, with a suffix behind.

    vLLM keeps one cache per layer name, so the sibling stands in its static forward context beside
    the layer itself and never runs.

    Args:
        backend: the layer's backend.
        num_heads: query heads of the layer, by which vLLM shares metadata builders.
        make_spec: the cache's spec, once vLLM's config is complete; None: there is no such cache.
    """

    def __init__(
        self,
        backend: type[AttentionBackend],
        num_heads: int,
        make_spec: Callable[[VllmConfig], RetrievalSpec | StreamingSpec | None],
    ) -> None:
        self.backend = backend
        self.num_heads = num_heads
        self.make_spec = make_spec
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        """The layer's backend."""
        return self.backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> RetrievalSpec | StreamingSpec | None:
        """The cache's spec; vLLM passes over a layer without one."""
        return self.make_spec(vllm_config)
