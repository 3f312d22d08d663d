"""What a server was asked to do, resolved from vLLM's config.

Every process (front end, engine core, workers) resolves the same plan from the same ``VllmConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_duo.config import SECTION, DuoConfig, ResolvedDuo, resolve
from vllm_duo.heads import HeadPattern, find_pattern
from vllm_duo.kv_cache.layout import KVShape, Layout, plan_layout

if TYPE_CHECKING:
    import numpy.typing as npt
    from vllm.config import VllmConfig

BACKEND_PATH = "vllm_duo.attention.backend.DuoAttentionBackend"


@dataclass(frozen=True, eq=False)
class ServerPlan:
    """The resolved settings and the memory layout of one server.

    Attributes:
        pattern: the head pattern in use.
        resolved: the selected heads, sink and recent sizes.
    """

    pattern: HeadPattern
    resolved: ResolvedDuo

    def retrieval_mask(self, layer: int) -> npt.NDArray[np.bool_]:
        """[Hkv] bool of a layer, True for a retrieval head.

        Raises:
            ValueError: the pattern has no such layer.
        """
        if layer >= self.resolved.selection.num_layers:
            raise ValueError(
                f"the head pattern has {self.resolved.selection.num_layers} layers, the model has a "
                f"layer {layer}: use a pattern made for this checkpoint (pattern=...)"
            )
        mask: npt.NDArray[np.bool_] = self.resolved.selection.retrieval[layer]
        return mask

    @property
    def pattern_name(self) -> str:
        """The pattern's folder name, for logs."""
        path = self.pattern.path
        return "in memory" if path is None else Path(path).resolve().name

    def layout(
        self,
        *,
        head_size: int,
        dtype_bytes: int,
        block_size: int,
        max_model_len: int,
        tensor_parallel_size: int = 1,
    ) -> Layout:
        """Block sizes and bins of both classes.

        Sizes beyond ``max_model_len`` are cut to it: no request can tell the difference, and the
        ring's tables and buffers would be as wide as the setting.

        Args:
            head_size: D.
            dtype_bytes: bytes of a cache element.
            block_size: tokens of a retrieval block, vLLM's ``--block-size``.
            max_model_len: longest request, in tokens.
            tensor_parallel_size: ranks that the heads are split over.

        Raises:
            ValueError: the KV heads cannot be split over the ranks.
        """
        return plan_layout(
            KVShape.split(
                self.resolved.selection.retrieval.tolist(),
                head_size=head_size,
                dtype_bytes=dtype_bytes,
                tensor_parallel_size=tensor_parallel_size,
            ),
            block_size=block_size,
            sink_size=min(self.resolved.sink_size, max_model_len),
            recent_size=min(self.resolved.recent_size, max_model_len),
        )


def is_duo(vllm_config: VllmConfig) -> bool:
    """Whether this server was started with ``--attention-backend duo``."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = vllm_config.attention_config.backend
    return (
        backend is AttentionBackendEnum.CUSTOM
        and backend.is_overridden()
        and backend.get_path() == BACKEND_PATH
    )


def has_duo_section(vllm_config: VllmConfig) -> bool:
    """Whether ``--additional-config`` has settings for duo."""
    settings = vllm_config.additional_config
    return isinstance(settings, dict) and SECTION in settings


def resolve_plan(vllm_config: VllmConfig) -> ServerPlan:
    """Find the pattern, check it against the model and apply the settings.

    Raises:
        ValueError: bad settings, no pattern, or a pattern of another shape.
    """
    settings = vllm_config.additional_config
    model = vllm_config.model_config
    return make_plan(
        settings if isinstance(settings, dict) else None,
        model.model,
        model.get_total_num_hidden_layers(),
        model.get_total_num_kv_heads(),
    )


def make_plan(
    additional_config: Mapping[str, Any] | None, model: str, num_layers: int, num_kv_heads: int
) -> ServerPlan:
    """The same from settings and a model's shape, as the command line has them.

    Args:
        additional_config: vLLM's ``--additional-config``.
        model: folder or Hugging Face id.
        num_layers: attention layers of the model.
        num_kv_heads: KV heads of one layer, before any tensor-parallel split.

    Raises:
        ValueError: bad settings, no pattern, or a pattern of another shape.
    """
    config = DuoConfig.from_additional_config(additional_config)
    pattern = find_pattern(config.pattern, model, num_layers, num_kv_heads)
    return ServerPlan(pattern, resolve(config, pattern))
