"""Configs and cache specs of real models' shapes, for ``simulated_engine.py``: no weights needed."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from vllm_duo.drafts import Drafts
from vllm_duo.server_plan import resolve_plan

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from vllm_duo.kv_cache.layout import Layout

Kind = Literal["duo", "stock"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What of a model decides its KV cache; ``pattern`` is the shipped one made for it.

    Layers for which ``slides`` is true have a sliding window of ``sliding_window`` tokens.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    pattern: str
    sliding_window: int | None = None
    slides: tuple[bool, ...] = ()


SHAPES = {
    "llama-3.1-8b": ModelShape(
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_size=128,
        pattern="Meta-Llama-3.1-8B-Instruct",
    ),
    "llama-2-7b": ModelShape(
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_size=128,
        pattern="Llama-2-7B-32K-Instruct",
    ),
}


def make_config(
    shape: ModelShape, section: dict[str, Any] | None, *, max_model_len: int, **settings: Any
) -> VllmConfig:
    """A server's config; with duo's backend where its section is given."""
    from vllm.engine.arg_utils import EngineArgs

    if section is not None:
        settings |= {"attention_backend": "duo", "additional_config": {"duo": section}}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(
            json.dumps(
                {
                    "architectures": ["LlamaForCausalLM"],
                    "model_type": "llama",
                    "dtype": "bfloat16",
                    "hidden_size": shape.num_heads * shape.head_size,
                    "intermediate_size": 4 * shape.num_heads * shape.head_size,
                    "num_hidden_layers": shape.num_layers,
                    "num_attention_heads": shape.num_heads,
                    "num_key_value_heads": shape.num_kv_heads,
                    "head_dim": shape.head_size,
                    "max_position_embeddings": max_model_len,
                    "vocab_size": 32_000,
                }
                | _window_keys(shape)
            )
        )
        return EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=max_model_len,
            **settings,
        ).create_engine_config()


def _window_keys(shape: ModelShape) -> dict[str, Any]:
    """What config.json says of sliding windows."""
    if shape.sliding_window is None:
        return {}
    kinds = ["sliding_attention" if slides else "full_attention" for slides in shape.slides]
    return {"sliding_window": shape.sliding_window, "layer_types": kinds}


def cache_specs(config: VllmConfig, kind: Kind) -> tuple[dict[str, KVCacheSpec], Layout | None]:
    """Spec of each cache as the model's layers declare them, and duo's layout."""
    from vllm.v1.attention.backends.utils import (
        get_supported_kv_cache_layouts,
        resolve_kv_cache_layout,
    )
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    model = config.model_config
    block_size = config.cache_config.block_size
    names = [
        f"model.layers.{index}.self_attn.attn"
        for index in range(model.get_total_num_hidden_layers())
    ]
    specs: dict[str, KVCacheSpec] = {}
    layout: Layout | None = None
    if kind == "stock":
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend as Backend

        spec = FullAttentionSpec(
            block_size=block_size,
            num_kv_heads=model.get_total_num_kv_heads(),
            head_size=model.get_head_size(),
            dtype=model.dtype,
        )
        specs = dict.fromkeys(names, spec)
    else:
        from vllm_duo.attention import specs as duo_specs
        from vllm_duo.attention.backend import DuoAttentionBackend as Backend
        from vllm_duo.attention.sibling_cache import SUFFIX

        layout = resolve_plan(config).layout(
            head_size=model.get_head_size(),
            dtype_bytes=model.dtype.itemsize,
            block_size=block_size,
            max_model_len=model.max_model_len,
            drafts=Drafts.of(config),
        )
        # All that the specs read of an attention layer.
        layer: Any = SimpleNamespace(
            head_size=model.get_head_size(),
            kv_cache_torch_dtype=model.dtype,
            kv_cache_dtype=config.cache_config.cache_dtype,
        )
        for index, name in enumerate(names):
            retrieval = layout.shape.retrieval_heads[index]
            streaming = layout.shape.streaming_heads[index]
            if retrieval:
                specs[name] = duo_specs.retrieval_spec(layer, retrieval, config)
            if streaming:
                sibling = name + SUFFIX if retrieval else name
                specs[sibling] = duo_specs.streaming_spec(layer, index, streaming, config)
    supported = [found.name for found in get_supported_kv_cache_layouts([Backend])]
    resolve_kv_cache_layout(config, [supported], specs.values())
    return specs, layout
