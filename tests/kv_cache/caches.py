"""Layouts, their caches' specs as the attention layers declare them, and vLLM's manager of them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor
from vllm.v1.request import Request

from vllm_duo import plugin
from vllm_duo.attention.sibling_cache import SUFFIX
from vllm_duo.compat.kv_cache_groups import planned_groups
from vllm_duo.kv_cache.layout import KVShape, Layout, plan_layout
from vllm_duo.kv_cache.manager import RingManager
from vllm_duo.kv_cache.spec import RetrievalSpec, StreamingSpec

plugin.register()

HEAD_SIZE = 16
MAX_MODEL_LEN = 4096


def layout_of(
    retrieval: tuple[int, ...],
    streaming: tuple[int, ...],
    *,
    block_size: int = 16,
    sink_size: int = 16,
    recent_size: int = 32,
    draft_token_bytes: int = 0,
    windows: tuple[int | None, ...] = (),
) -> Layout:
    """The planned layout of heads by layer, in float32."""
    shape = KVShape(
        retrieval_heads=retrieval,
        streaming_heads=streaming,
        head_size=HEAD_SIZE,
        dtype_bytes=4,
        draft_token_bytes=draft_token_bytes,
    )
    return plan_layout(
        shape,
        block_size=block_size,
        sink_size=sink_size,
        recent_size=recent_size,
        windows=windows,
    )


def two_bins(*, sink_size: int = 16, recent_size: int = 32) -> Layout:
    """Two layers with one retrieval and two streaming heads each, a bin for each layer."""
    layout = layout_of((1, 1), (2, 2), sink_size=sink_size, recent_size=recent_size)
    return replace(layout, span=replace(layout.span, block_size=16), bins=((0,), (1,)))


def layer_name(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.attn"


def specs_of(layout: Layout) -> dict[str, RetrievalSpec | StreamingSpec]:
    """Spec by cache name; a layer with both classes has a sibling."""
    specs: dict[str, RetrievalSpec | StreamingSpec] = {}
    heads_by_layer = zip(layout.shape.retrieval_heads, layout.shape.streaming_heads, strict=True)
    for layer, (retrieval, streaming) in enumerate(heads_by_layer):
        name = layer_name(layer)
        if retrieval:
            specs[name] = RetrievalSpec(
                block_size=layout.block_size,
                num_kv_heads=retrieval,
                head_size=HEAD_SIZE,
                dtype=torch.float32,
            )
        if streaming:
            span = layout.span_of(layout.bin_of(layer))
            specs[name + SUFFIX if retrieval else name] = StreamingSpec(
                block_size=layout.block_size,
                slots_per_block=span.block_size,
                num_kv_heads=streaming,
                head_size=HEAD_SIZE,
                dtype=torch.float32,
                sink_size=span.sink_size,
                recent_size=span.recent_size,
                bin=layout.bin_of(layer),
            )
    return specs


def config_of(layout: Layout, num_blocks: int) -> KVCacheConfig:
    """What the scheduler gets: groups that carry one layer's spec."""
    groups = planned_groups(specs_of(layout))
    tensor = KVCacheTensor(
        size=num_blocks * layout.block_bytes,
        layers=[],
        layer_stride=0,
        block_stride=layout.block_bytes,
    )
    config = KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[tensor], kv_cache_groups=groups)
    return kv_cache_utils.generate_scheduler_kv_cache_config([config])


class Engine:
    """vLLM's manager with a request's way through it, as the scheduler goes it."""

    def __init__(
        self,
        layout: Layout,
        num_blocks: int = 200,
        enable_caching: bool = False,
        use_eagle: bool = False,
    ) -> None:
        config = config_of(layout, num_blocks)
        sizes = [group.kv_cache_spec.block_size for group in config.kv_cache_groups]
        self.hash_size = math.gcd(*sizes)
        self.manager = KVCacheManager(
            config,
            max_model_len=MAX_MODEL_LEN,
            scheduler_block_size=math.lcm(*sizes),
            hash_block_size=self.hash_size,
            enable_caching=enable_caching,
            use_eagle=use_eagle,
        )
        self.pool = self.manager.block_pool
        kv_cache_utils.init_none_hash(sha256)

    def request(self, name: str, num_tokens: int) -> Request:
        return Request(
            request_id=name,
            prompt_token_ids=[7] * num_tokens,
            sampling_params=SamplingParams(max_tokens=8),
            pooling_params=None,
            block_hasher=kv_cache_utils.get_request_block_hasher(self.hash_size, sha256),
        )

    def step(self, request: Request, num_tokens: int, whole: bool = False) -> bool:
        """Allocate a chunk; False if the pool cannot hold it (or, with ``whole``, the request)."""
        hits: dict = {}
        if request.num_computed_tokens == 0:
            blocks, num_hits, _ = self.manager.get_computed_blocks(request)
            hits = {"num_new_computed_tokens": num_hits, "new_computed_blocks": blocks}
        new = self.manager.allocate_slots(request, num_tokens, **hits, full_sequence_must_fit=whole)
        if new is None:
            return False
        request.num_computed_tokens += num_tokens
        return True

    def preempt(self, request: Request) -> None:
        self.manager.free(request)
        request.num_computed_tokens = 0

    def tables(self, request: Request) -> tuple[list[int], ...]:
        return self.manager.get_block_ids(request.request_id)

    def check(self, requests: list[Request]) -> None:
        """Free + held == all but the null block, which nobody holds; no block is held twice."""
        for manager in self.manager.coordinator.single_type_managers:
            if isinstance(manager, RingManager):
                manager.allocator.check_integrity()
        held = [block for request in requests for table in self.tables(request) for block in table]
        assert self.pool.null_block.block_id not in held
        assert len(held) == len(set(held))
        assert len(held) + self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
