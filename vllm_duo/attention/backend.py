"""``DuoAttentionBackend``: what vLLM asks a backend about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_duo.kv_cache.spec import RetrievalSpec, StreamingSpec
from vllm_duo.model_facts import HEAD_SIZES
from vllm_duo.support import CACHE_DTYPES

if TYPE_CHECKING:
    from vllm.config.cache import CacheDType
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_duo.attention.impl import DuoAttentionImpl
    from vllm_duo.attention.metadata import DuoMetadataBuilder


class DuoAttentionBackend(AttentionBackend):
    """Full paged blocks for retrieval heads, a ring of sink and recent tokens for streaming heads."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Refuse vLLM's layer wrappers, which subclass a backend to change what its layers mean.

        They exist for non-causal prefixes, chunked local attention, shared caches and the like.

        Raises:
            NotImplementedError: always; while the model is built, before its weights load.
        """
        raise NotImplementedError(
            f"--attention-backend duo does not support the attention layers that vLLM wraps as "
            f"{cls.__name__}: serve this model with vLLM's own attention backend"
        )

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = list(CACHE_DTYPES)
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        """Must be a member of vLLM's enum; ``duo`` is an alias of CUSTOM."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[DuoAttentionImpl]:
        """Per-layer implementation."""
        from vllm_duo.attention.impl import DuoAttentionImpl

        return DuoAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[DuoMetadataBuilder]:
        """Per-step metadata."""
        from vllm_duo.attention.metadata import DuoMetadataBuilder

        return DuoMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Head sizes that the operators serve."""
        return list(HEAD_SIZES)

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        """The Triton kernels are compiled for Ampere and later (tests/ops/triton_compile.py)."""
        return capability >= DeviceCapability(8, 0)

    @classmethod
    def supports_sink(cls) -> bool:
        """Learned sinks, a logit of each query head (``ops/decode``); refused on GPUs (``impl.py``)."""
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Block-outermost only: layers of different widths share one pool block."""
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Check that the layer's classes were set up before vLLM collects the specs.

        Raises:
            RuntimeError: a layer still has vLLM's own spec, so its heads were never split.
        """
        if not isinstance(spec, (RetrievalSpec, StreamingSpec)):
            raise RuntimeError(
                f"a layer of the duo backend has a {type(spec).__name__} instead of duo's specs: "
                "the model loader did not call process_weights_after_loading; use another "
                "--load-format"
            )
        return spec
