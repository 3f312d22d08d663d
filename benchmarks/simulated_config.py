"""Configs and cache specs of real models' shapes, for ``simulated_engine.py``: no weights needed."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from vllm_duo.drafts import Drafts, draft_model_of
from vllm_duo.server_plan import resolve_plan

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

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

EAGLE_HEAD = ModelShape(num_layers=1, num_heads=32, num_kv_heads=8, head_size=128, pattern="")
"""The published heads for ``llama-3.1-8b``: one layer of the model's."""


def make_config(
    shape: ModelShape,
    section: dict[str, Any] | None,
    *,
    max_model_len: int,
    num_speculative_tokens: int = 0,
    eagle_head: ModelShape | None = None,
    **settings: Any,
) -> VllmConfig:
    """A server's config; with duo's backend where its section is given.

    Args:
        shape: the model.
        section: duo's.
        max_model_len: longest request, in tokens.
        num_speculative_tokens: drafts of a step at most; 0 for none.
        eagle_head: drafts in place of n-grams.
        settings: more of vLLM's engine arguments.
    """
    from vllm.engine.arg_utils import EngineArgs

    if section is not None:
        settings |= {"attention_backend": "duo", "additional_config": {"duo": section}}
    with tempfile.TemporaryDirectory() as folder:
        if num_speculative_tokens:
            drafts: dict[str, Any] = {"num_speculative_tokens": num_speculative_tokens}
            if eagle_head is None:
                drafts["method"] = "ngram"
            else:
                head = _write_model(Path(folder) / "head", eagle_head, max_model_len)
                drafts |= {"method": "eagle", "model": head}
            settings["speculative_config"] = drafts
        return EngineArgs(
            model=_write_model(Path(folder) / "model", shape, max_model_len),
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=max_model_len,
            **settings,
        ).create_engine_config()


def _write_model(folder: Path, shape: ModelShape, max_model_len: int) -> str:
    """Write config.json alone; returns the folder."""
    config = {
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
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | _window_keys(shape)))
    return str(folder)


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

        specs = dict.fromkeys(names, _full_spec(model, block_size))
    else:
        from vllm_duo.attention.backend import DuoAttentionBackend as Backend
        from vllm_duo.attention.sibling_cache import SUFFIX
        from vllm_duo.attention.specs import retrieval_spec, streaming_spec

        layout = resolve_plan(config).layout(
            head_size=model.get_head_size(),
            dtype_bytes=model.dtype.itemsize,
            block_size=block_size,
            max_model_len=model.max_model_len,
            drafts=Drafts.of(config),
        )
        layer = _layer(model, config)
        for index, name in enumerate(names):
            retrieval = layout.shape.retrieval_heads[index]
            streaming = layout.shape.streaming_heads[index]
            if retrieval:
                specs[name] = retrieval_spec(layer, retrieval, config)
            if streaming:
                sibling = name + SUFFIX if retrieval else name
                specs[sibling] = streaming_spec(layer, index, streaming, config)
    specs |= _head_specs(config, kind)
    supported = [found.name for found in get_supported_kv_cache_layouts([Backend])]
    resolve_kv_cache_layout(config, [supported], specs.values())
    return specs, layout


def _head_specs(config: VllmConfig, kind: Kind) -> dict[str, KVCacheSpec]:
    """Spec of each layer of an EAGLE head, numbered on from the model's; none without one."""
    from vllm_duo.attention.specs import retrieval_spec

    head = draft_model_of(config)
    if head is None:
        return {}
    spec: KVCacheSpec
    if kind == "stock":
        spec = _full_spec(head, config.cache_config.block_size)
    else:
        spec = retrieval_spec(_layer(head, config), head.get_total_num_kv_heads(), config)
    first = config.model_config.get_total_num_hidden_layers()
    layers = range(first, first + head.get_total_num_hidden_layers())
    return {f"model.layers.{layer}.self_attn.attn": spec for layer in layers}


def _layer(model: ModelConfig, config: VllmConfig) -> Any:
    """All that duo's specs read of an attention layer."""
    return SimpleNamespace(
        head_size=model.get_head_size(),
        kv_cache_torch_dtype=model.dtype,
        kv_cache_dtype=config.cache_config.cache_dtype,
    )


def _full_spec(model: ModelConfig, block_size: int) -> FullAttentionSpec:
    """Spec of a layer all of whose heads keep every token."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(
        block_size=block_size,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        dtype=model.dtype,
    )
