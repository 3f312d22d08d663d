"""What a server was asked to do, resolved from vLLM's config.

Every process (front end, engine core, workers) resolves the same plan from the same ``VllmConfig``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_duo.config import SECTION, DuoConfig, ResolvedDuo, resolve, resolve_without_pattern
from vllm_duo.drafts import NO_DRAFTS, Drafts
from vllm_duo.heads import HeadPattern, find_pattern
from vllm_duo.kv_cache.layout import KVShape, Layout, plan_layout
from vllm_duo.kv_cache.ranks import PARTITION, heads_per_rank, own_heads, stage_sizes
from vllm_duo.kv_cache.split_cost import SplitCost, replan, split_cost
from vllm_duo.skipped_layers import skipped_layers
from vllm_duo.windows import Windows, chosen_layers, in_force, layer_windows, slides_throughout

if TYPE_CHECKING:
    import numpy.typing as npt
    from vllm.config import ModelConfig, VllmConfig

BACKEND_PATH = "vllm_duo.attention.backend.DuoAttentionBackend"

# Every layer of a model asks for the same one.
_plan_layout = lru_cache(maxsize=8)(plan_layout)


@dataclass(frozen=True, eq=False)
class ServerPlan:
    """The resolved settings and the memory layout of one server.

    Attributes:
        pattern: the head pattern in use; of a model whose layers all slide one that nothing is read of.
        resolved: the selected heads, sink and recent sizes.
        tensor_parallel_size: ranks that each layer's heads are split over.
        stage_sizes: layers of each pipeline stage; empty: one stage.
        windows: the model's own sliding windows that are in force, by layer; empty: none.
        skipped_layers: whose caches keep the model's dtype where the others' are quantised.
    """

    pattern: HeadPattern
    resolved: ResolvedDuo
    tensor_parallel_size: int = 1
    stage_sizes: tuple[int, ...] = ()
    windows: Windows = ()
    skipped_layers: frozenset[int] = frozenset()

    @property
    def pipeline_parallel_size(self) -> int:
        """Stages that the layers are split over."""
        return max(len(self.stage_sizes), 1)

    @property
    def num_ranks(self) -> int:
        """Ranks of all stages."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def first_layer(self, stage: int) -> int:
        """Index of a pipeline stage's first layer."""
        return sum(self.stage_sizes[:stage])

    @property
    def num_rank_heads(self) -> int:
        """KV heads of a layer on each rank."""
        return heads_per_rank(self.resolved.selection.num_kv_heads, self.tensor_parallel_size)

    def retrieval_mask(self, layer: int, rank: int = 0) -> npt.NDArray[np.bool_]:
        """[Hkv / tp] bool of a layer's heads on one rank, True for a retrieval head.

        Args:
            layer: index in the model.
            rank: tensor-parallel rank.

        Raises:
            ValueError: the pattern has no such layer.
        """
        if layer >= self.resolved.selection.num_layers:
            raise ValueError(
                f"the head pattern has {self.resolved.selection.num_layers} layers, the model has a "
                f"layer {layer}: use a pattern made for this checkpoint (pattern=...)"
            )
        selection = self.resolved.selection
        own = own_heads(selection.num_kv_heads, rank, self.tensor_parallel_size)
        mask: npt.NDArray[np.bool_] = selection.retrieval[layer][own]
        return mask

    @property
    def streaming_quantised(self) -> bool:
        """Whether the streaming heads' cache is quantised where the retrieval heads' is."""
        return self.resolved.streaming_cache_dtype == "same"

    @property
    def pattern_name(self) -> str:
        """The pattern's folder name, for logs."""
        if slides_throughout(self.windows):
            return "none"
        path = self.pattern.path
        return "in memory" if path is None else Path(path).resolve().name

    def layout(
        self,
        *,
        head_size: int,
        dtype_bytes: int,
        row_bytes: int | None = None,
        block_size: int,
        max_model_len: int,
        drafts: Drafts = NO_DRAFTS,
    ) -> Layout:
        """Block sizes and bins of both classes, of all ranks.

        Sizes beyond ``max_model_len`` are cut to it: no request can tell the difference, and the
        ring's tables and buffers would be as wide as the setting.

        Args:
            head_size: D.
            dtype_bytes: bytes of a number of the model's own dtype.
            row_bytes: bytes of a token in one KV head of a quantised cache.
            block_size: tokens of a retrieval block, vLLM's ``--block-size``.
            max_model_len: longest request, in tokens.
            drafts: what speculative decoding adds.

        Raises:
            ValueError: the KV heads cannot be split over the ranks.
        """
        return _plan_layout(
            KVShape.split(
                self.resolved.selection.retrieval.tolist(),
                head_size=head_size,
                dtype_bytes=dtype_bytes,
                row_bytes=row_bytes,
                streaming_quantised=self.streaming_quantised,
                skipped_layers=self.skipped_layers,
                tensor_parallel_size=self.tensor_parallel_size,
                draft_token_bytes=drafts.token_bytes(self.tensor_parallel_size),
                stage_sizes=self.stage_sizes or None,
            ),
            block_size=block_size,
            sink_size=min(self.resolved.sink_size, max_model_len),
            recent_size=min(self.resolved.recent_size, max_model_len),
            draft_size=drafts.size,
            windows=tuple(
                None if window is None else min(window, max_model_len) for window in self.windows
            ),
        )

    def split_costs(
        self, layout: Layout, num_tokens: int, drafts: Drafts = NO_DRAFTS
    ) -> tuple[SplitCost, SplitCost | None]:
        """What splitting over ranks and stages costs, and what it would with ``balance``.

        Args:
            layout: this plan's.
            num_tokens: length of the request to compare at.
            drafts: that the layout was planned for.

        Returns:
            The cost, and that of a balanced selection: None where the heads are balanced already or a
            threshold selects them.
        """
        resolved, ranks = self.resolved, self.tensor_parallel_size
        stages = self.pipeline_parallel_size
        cost = split_cost(layout, resolved.selection.retrieval.tolist(), num_tokens, stages, drafts)
        if ranks == 1 or resolved.balance or resolved.cut != "sparsity":
            return cost, None
        layers = chosen_layers(self.windows)
        if layers == []:
            return cost, None
        selection = self.pattern.select(
            sparsity=resolved.cut_value,
            balance_ranks=ranks,
            layers=layers,
        )
        mask = selection.retrieval.tolist()
        balanced = replan(layout, mask, ranks, self.stage_sizes or None, drafts)
        return cost, split_cost(balanced, mask, num_tokens, stages, drafts)


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
        vllm_config.parallel_config.tensor_parallel_size,
        vllm_config.parallel_config.pipeline_parallel_size,
        windows_of(model),
        skipped_layers(
            vllm_config.cache_config.kv_cache_dtype_skip_layers,
            model.get_total_num_hidden_layers(),
            _all_windows(model),
        ),
    )


def windows_of(model: ModelConfig) -> Windows:
    """The sliding windows of a model that hide something from a server's requests, by layer."""
    return in_force(_all_windows(model), longest_request(model))


def _all_windows(model: ModelConfig) -> Windows:
    num_layers, window = model.get_total_num_hidden_layers(), model.get_sliding_window()
    kinds = getattr(model.hf_text_config, "layer_types", None)
    return layer_windows(num_layers, window, kinds) or ()


def longest_request(model: ModelConfig) -> float:
    """Tokens of the longest request, by which windows are in force or not.

    ``--max-model-len auto`` shortens requests after the caches have been described, so there the length
    counts that the model is made for.
    """
    if model.original_max_model_len == -1:
        return float(model.model_arch_config.derived_max_model_len_and_key[0])
    return float(model.max_model_len)


def make_plan(
    additional_config: Mapping[str, Any] | None,
    model: str,
    num_layers: int,
    num_kv_heads: int,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    windows: Windows = (),
    skipped: frozenset[int] = frozenset(),
) -> ServerPlan:
    """The same from settings and a model's shape, as the command line has them.

    Like vLLM it takes the layers of each pipeline stage from ``VLLM_PP_LAYER_PARTITION``, if that is
    set.

    Args:
        additional_config: vLLM's ``--additional-config``.
        model: folder or Hugging Face id.
        num_layers: attention layers of the model.
        num_kv_heads: KV heads of one layer, before any tensor-parallel split.
        tensor_parallel_size: ranks that these are split over.
        pipeline_parallel_size: stages that the layers are split over.
        windows: the model's own sliding windows that are in force, by layer. Where every layer has
            one, no pattern is looked for.
        skipped: layers whose caches keep the model's dtype where the others' are quantised.

    Raises:
        ValueError: bad settings, no pattern, a pattern of another shape, or impossible stages.
    """
    config = DuoConfig.from_additional_config(additional_config)
    windows = tuple(windows)
    if slides_throughout(windows):
        pattern = HeadPattern.uniform(num_layers, num_kv_heads, 0.0)
        resolved = resolve_without_pattern(config, windows, num_kv_heads)
    else:
        pattern = find_pattern(config.pattern, model, num_layers, num_kv_heads)
        resolved = resolve(config, pattern, tensor_parallel_size, windows)
    stages: tuple[int, ...] = ()
    if pipeline_parallel_size > 1:
        stages = stage_sizes(num_layers, pipeline_parallel_size, os.environ.get(PARTITION))
    return ServerPlan(pattern, resolved, tensor_parallel_size, stages, windows, skipped)
