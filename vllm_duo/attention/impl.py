"""``DuoAttentionImpl``: one layer's attention, over its one or two caches."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_duo.attention.head_buffers import HeadBuffers
from vllm_duo.attention.layer_cache import check_format, check_scales
from vllm_duo.attention.metadata import DuoMetadata
from vllm_duo.attention.retrieval_prefill import layer_kernel
from vllm_duo.attention.sibling_cache import SUFFIX, UNUSED_SUFFIX, SiblingCache
from vllm_duo.attention.specs import (
    own_rank,
    own_stage,
    plan_of,
    retrieval_spec,
    streaming_spec,
    unused_spec,
)
from vllm_duo.drafts import builds_drafter
from vllm_duo.kv_cache.formats import FORMATS
from vllm_duo.kv_cache.packing import MAX_GROUPS
from vllm_duo.logging import get_logger
from vllm_duo.ops import cpu, gpu
from vllm_duo.ops.batch import HeadMap, LayerCaches, PagedTable, RingTable
from vllm_duo.ops.layer import attend_and_write
from vllm_duo.server_plan import longest_request
from vllm_duo.support import CACHE_DTYPES
from vllm_duo.windows import in_force

if TYPE_CHECKING:
    from vllm_duo.server_plan import ServerPlan

logger = get_logger(__name__)


class DuoAttentionImpl(AttentionImpl[DuoMetadata]):
    """Attention of one layer; the layer's classes are set up after its weights have loaded.

    Raises:
        NotImplementedError: the layer has a feature that the operators lack. Most of these are
            refused for the whole server before weights load; a model may still add one per layer.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **extra: Any,
    ) -> None:
        self.vllm_config = get_current_vllm_config()
        unsupported = {
            "ALiBi slopes": alibi_slopes is not None,
            "soft-capped logits": bool(logits_soft_cap),
            f"attention type {attn_type}": attn_type != AttentionType.DECODER,
            "another layer's KV cache": kv_sharing_target_layer_name is not None,
            # A checkpoint may bring its own KV scheme, which vLLM applies layer by layer.
            f"a {kv_cache_dtype} KV cache": kv_cache_dtype not in CACHE_DTYPES,
            **{f"the argument {name}": value is not None for name, value in extra.items()},
        }
        reasons = [name for name, present in unsupported.items() if present]
        if reasons:
            raise NotImplementedError(
                f"--attention-backend duo does not support a layer with {', '.join(reasons)}: "
                "serve this model with vLLM's own attention backend"
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.form = FORMATS.get(kv_cache_dtype)
        if sinks is not None and tuple(sinks.shape) != (num_heads,):
            raise ValueError(
                f"a layer has learned sinks of the shape {list(sinks.shape)}, expected [{num_heads}], "
                "one of each of its query heads: the model must hand over those of its own rank alone"
            )
        self.loaded_sinks = sinks  # the model's parameter, whose weights have yet to load
        self.sinks: torch.Tensor | None = None
        # What drafts has heads of its own, all of which keep every token.
        self.drafts = builds_drafter()
        self.streaming_quantised = True
        # vLLM's name; 0 where the model has switched it off.
        self.sliding_window = sliding_window or None
        if self.drafts and sliding_window:
            raise NotImplementedError(
                "--attention-backend duo does not support a draft model or EAGLE head with a sliding "
                f"window, got one of {sliding_window} tokens: use another one"
            )
        if not self.drafts:
            self._check_heads(plan_of(self.vllm_config))
            self.streaming_quantised = plan_of(self.vllm_config).streaming_quantised
        self.layer_name: str | None = None
        self.heads: HeadMap | None = None
        self.sibling: SiblingCache | None = None
        self.retrieval_prefill: gpu.RetrievalPrefill | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Split the layer's heads and describe its caches; safe to call again on a reload."""
        context = self.vllm_config.compilation_config.static_forward_context
        name, layer = next(
            (name, layer) for name, layer in context.items() if getattr(layer, "impl", None) is self
        )
        if self.loaded_sinks is not None:
            self._take_sinks(layer, self.loaded_sinks.detach())
        check_scales(name, layer)
        if self.heads is not None:
            return
        index = extract_layer_index(name)
        if type(layer) is not Attention or layer.head_size_v != self.head_size:
            raise NotImplementedError(
                f"--attention-backend duo does not support layer {name}, a {type(layer).__name__} "
                f"with head sizes {layer.head_size} and {layer.head_size_v}: serve this model with "
                "vLLM's own attention backend"
            )
        device = torch.device(self.vllm_config.device_config.device_type)
        if self.drafts:
            self._keep_all(name, layer, device)
            return
        plan = plan_of(self.vllm_config)
        self._check_window(plan, name, index)
        skipped = index in plan.skipped_layers
        check_format(name, layer, "auto" if skipped else self.vllm_config.cache_config.cache_dtype)
        rank = own_rank(plan)
        heads = HeadMap.from_mask(plan.retrieval_mask(index, rank), device)
        retrieval = partial(retrieval_spec, layer, len(heads.retrieval))
        streaming = partial(streaming_spec, layer, index, len(heads.streaming))
        if plan.tensor_parallel_size > 1:
            name = _name_by_rank(layer, name, rank, context)
        # A layer of streaming heads alone owns their spec itself: vLLM looks up metadata by its name.
        layer.get_kv_cache_spec = retrieval if len(heads.retrieval) else streaming
        if len(heads.retrieval) and len(heads.streaming):
            self.sibling = SiblingCache(layer.attn_backend, self.num_heads, streaming)
            context[name + SUFFIX] = self.sibling
        stage = own_stage(plan)
        if plan.num_ranks > 1 and index == plan.first_layer(stage):
            # Which groups lack heads here is known once vLLM's config is complete.
            for group in range(MAX_GROUPS):
                place = stage * plan.tensor_parallel_size + rank
                unused = partial(unused_spec, layer, group, place)
                sibling = SiblingCache(layer.attn_backend, self.num_heads, unused)
                context[f"{name}{UNUSED_SUFFIX}{group}"] = sibling
        self._set_heads(name, layer, heads)
        if heads.retrieval.is_cpu:
            _log_kernels()
        else:
            self.retrieval_prefill = layer_kernel(
                plan.resolved.retrieval_prefill,
                heads,
                dtype=layer.kv_cache_torch_dtype,
                head_size=self.head_size,
                block_size=self.vllm_config.cache_config.block_size,
                group=self.num_heads // self.num_kv_heads,
                scale=self.scale,
                has_sinks=self.sinks is not None,
            )

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: DuoMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend, then write the step's tokens into the caches.

        Args:
            layer: the attention layer.
            query: [T, Hq, D]; rows beyond the batch's tokens are padding.
            key: [T, Hkv, D].
            value: [T, Hkv, D].
            kv_cache: the layer's own cache: retrieval, or streaming where it has no retrieval head.
            attn_metadata: of ``kv_cache``; None while vLLM profiles.
            output: [T, Hq, D], mutated in place.
            output_scale: not supported.
            output_block_scale: not supported.

        Returns:
            ``output``.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("duo does not support fused output quantisation")
        if attn_metadata is None:
            return output.zero_()
        assert self.heads is not None, "customize_spec checks that heads were split"
        caches = self._caches(layer, kv_cache, attn_metadata)
        batch = attn_metadata.batch
        attend_and_write(
            query,
            key,
            value,
            self.heads,
            caches,
            batch,
            self.scale,
            output,
            self.retrieval_prefill,
            self.sinks,
        )
        return output

    def _take_sinks(self, layer: Attention, loaded: torch.Tensor) -> None:
        """Copy the loaded sinks, to where they lay before: CUDA graphs read them there."""
        if self.sinks is not None:
            self.sinks.copy_(loaded)
            return
        self.sinks = loaded.to(torch.float32, copy=True).contiguous()
        if not self.sinks.is_cpu:
            # Among the model's buffers, which vLLM's sleep mode keeps.
            layer.register_buffer("duo_sinks", self.sinks, persistent=False)

    def _keep_all(self, name: str, layer: Attention, device: torch.device) -> None:
        """Set up a layer that drafts: every head keeps every token."""
        layer.get_kv_cache_spec = partial(retrieval_spec, layer, self.num_kv_heads)
        every = np.ones(self.num_kv_heads, dtype=np.bool_)
        self._set_heads(name, layer, HeadMap.from_mask(every, device))

    def _set_heads(self, name: str, layer: Attention, heads: HeadMap) -> None:
        self.layer_name = name
        self.heads = heads
        if not heads.retrieval.is_cpu:
            layer.duo_heads = HeadBuffers(heads)

    def _check_heads(self, plan: ServerPlan) -> None:
        """Check a new layer against the pattern.

        Raises:
            ValueError: the layer does not have the KV heads that the pattern gives this rank.
        """
        if self.num_kv_heads == plan.num_rank_heads:
            return
        ranks = plan.tensor_parallel_size
        split = f" ({plan.num_rank_heads} on each of {ranks} ranks)" if ranks > 1 else ""
        raise ValueError(
            f"a layer has {self.num_kv_heads} KV heads, the head pattern "
            f"{plan.resolved.selection.num_kv_heads}{split}: use a pattern made for this checkpoint "
            "(pattern=...); models whose layers differ in their KV heads are not supported"
        )

    def _check_window(self, plan: ServerPlan, name: str, index: int) -> None:
        """Hold the layer's own sliding window against what the plan has read from the model's config.

        Raises:
            NotImplementedError: they differ: the model's code goes by other keys than the usual ones.
        """
        planned = plan.windows[index] if plan.windows else None
        longest = longest_request(self.vllm_config.model_config)
        (own,) = in_force((self.sliding_window,), longest) or (None,)
        if own != planned:
            raise NotImplementedError(
                f"--attention-backend duo: layer {name} has a sliding window of {own or 'no'} tokens, "
                f"expected {planned or 'none'} by sliding_window and layer_types in its config: "
                "serve this model with vLLM's own attention backend"
            )

    def _caches(
        self, layer: torch.nn.Module, kv_cache: torch.Tensor, own: DuoMetadata
    ) -> LayerCaches:
        quantised: dict[str, Any] = {}
        if self.form is not None:
            quantised = {"form": self.form, "streaming_quantised": self.streaming_quantised}
            if not self.form.token_scales:
                quantised["key_scale"] = layer._k_scale_float
                quantised["value_scale"] = layer._v_scale_float
        if isinstance(own.table, RingTable):
            return LayerCaches(streaming=kv_cache, ring=own.table, **quantised)
        if self.sibling is None:
            return LayerCaches(retrieval=kv_cache, paged=own.table, **quantised)
        assert self.layer_name is not None
        by_layer = get_forward_context().attn_metadata
        ring = by_layer[self.layer_name + SUFFIX].table
        assert isinstance(own.table, PagedTable)
        return LayerCaches(kv_cache, own.table, self.sibling.kv_cache, ring, **quantised)


@cache
def _log_kernels() -> None:
    logger.info("duo: %s", cpu.describe())


def _name_by_rank(layer: Attention, name: str, rank: int, context: dict[str, Any]) -> str:
    """Give a layer a name of its rank's own, and return it.

    vLLM keeps one cache a name and wants it alike on all ranks, which have different heads of a class.

    Args:
        layer: renamed.
        name: its name in the model.
        rank: of this process.
        context: layers by name, mutated in place.
    """
    own = f"{name}.duo_tp{rank}"
    context[own] = context.pop(name)
    layer.layer_name = own
    return own
