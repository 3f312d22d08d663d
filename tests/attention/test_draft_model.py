"""Layers of a draft model or an EAGLE head beside the model's own, before vLLM's own grouping."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.compilation.backends import set_model_tag
from vllm.config import set_current_vllm_config
from vllm.config.utils import replace
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.utils import (
    get_supported_kv_cache_layouts,
    resolve_kv_cache_layout,
)
from vllm.v1.core import kv_cache_utils
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tests.this_process import this_process  # noqa: F401 - a fixture
from vllm_duo import HeadPattern
from vllm_duo.attention.backend import DuoAttentionBackend
from vllm_duo.compat.pool_report import check_and_report
from vllm_duo.drafts import DRAFT_MODEL, EAGLE_TAG, is_drafting_layer, is_made_for_drafts
from vllm_duo.kv_cache.spec import RetrievalSpec, StreamingSpec

HEAD_SIZE = 16
POOL_BYTES = 2**26
METHODS = pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3"])


def write_config(folder, layers, kv_heads):
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2 * kv_heads * HEAD_SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2 * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_SIZE,
        "vocab_size": 64,
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def server(tmp_path):
    """Makes a server's config: 2 layers with 2 KV heads, 3 layers with 4 KV heads draft for them."""

    def server(mask, method, cache="auto", own=None):
        model = write_config(tmp_path / "model", 2, 2)
        draft = write_config(tmp_path / "draft", 3, 4)
        HeadPattern(np.asarray(mask, dtype=float)).save(model / "duo_pattern")
        return EngineArgs(
            model=str(model),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="float32",
            block_size=16,
            kv_cache_dtype=cache,
            attention_backend="duo",
            additional_config={"duo": {"threshold": 0.5}},
            speculative_config={
                "method": method,
                "model": str(draft),
                "num_speculative_tokens": 5,
                "kv_cache_dtype": own,
            },
        ).create_engine_config()

    return server


def make_layers(config, layers, kv_heads, prefix="model"):
    """Attention layers as a model's constructor and loader make them."""
    with set_current_vllm_config(config):
        made = [
            Attention(
                2 * kv_heads,
                HEAD_SIZE,
                1.0,
                kv_heads,
                cache_config=config.cache_config,
                prefix=f"{prefix}.layers.{layer}.self_attn.attn",
            )
            for layer in layers
        ]
    for layer in made:
        layer.process_weights_after_loading(torch.float32)
    return made


def specs_of(config):
    """Spec of each cache, the model's and the draft model's, as vLLM's runner collects them."""
    assert not is_made_for_drafts(config)
    make_layers(config, range(2), 2)
    speculation = config.speculative_config
    attention = replace(config.attention_config, backend=speculation.attention_backend)
    if speculation.method == DRAFT_MODEL:
        drafting = replace(config, model_config=speculation.draft_model_config)
        tag, prefix, numbers = DRAFT_MODEL, f"{DRAFT_MODEL}.model", range(3)
    else:
        # Of the server's model; its layers are numbered on from the model's.
        drafting = replace(config, attention_config=attention)
        tag, prefix, numbers = EAGLE_TAG, "model", range(2, 5)
    if speculation.kv_cache_dtype is not None:
        own = replace(config.cache_config, cache_dtype=speculation.kv_cache_dtype)
        drafting = replace(drafting, cache_config=own)
    assert is_made_for_drafts(drafting)
    with set_model_tag(tag):
        layers = make_layers(drafting, numbers, 4, prefix)
    specs = GPUModelRunner.get_kv_cache_spec(
        SimpleNamespace(vllm_config=config, shared_kv_cache_layers={})
    )
    supported = [found.name for found in get_supported_kv_cache_layouts([DuoAttentionBackend])]
    resolve_kv_cache_layout(config, [supported], specs.values())
    return specs, layers


@METHODS
def test_its_heads_keep_every_token(server, method):
    specs, layers = specs_of(server([[0, 1], [0, 0]], method))
    own = {name: spec for name, spec in specs.items() if is_drafting_layer(name, 2)}
    every = RetrievalSpec(block_size=16, num_kv_heads=4, head_size=HEAD_SIZE, dtype=torch.float32)
    assert list(own) == [layer.layer_name for layer in layers]
    assert set(own.values()) == {every}
    assert all(layer.impl.heads.retrieval.tolist() == [0, 1, 2, 3] for layer in layers)
    streaming = [spec for spec in specs.values() if isinstance(spec, StreamingSpec)]
    # Room for what it drafts, and blocks for the tokens ahead that its own passes write.
    assert {(spec.draft_size, spec.lookahead_size) for spec in streaming} == {(5, 5)}


@METHODS
@pytest.mark.parametrize("mask", [[[0, 1], [0, 0]], [[0, 0], [0, 0]], [[1, 1], [1, 0]]])
def test_vllm_groups_both_models_as_planned(server, mask, method):
    config = server(mask, method)
    specs, layers = specs_of(config)
    (found,) = kv_cache_utils.get_kv_cache_configs(config, [specs], [POOL_BYTES])
    layout = check_and_report(config, found)
    assert layout.block_bytes >= 16 * 3 * 4 * 2 * HEAD_SIZE * 4
    assert found.num_blocks == layout.num_blocks(POOL_BYTES)
    assert {layer.layer_name for layer in layers} <= set(found.kv_cache_groups[0].layer_names)


# Bytes of a token in one of its heads: 16 keys and 16 values, and two scales.
@METHODS
@pytest.mark.parametrize(
    ("cache", "own", "head_bytes"),
    [
        ("fp8", None, 32),
        ("int4_per_token_head", None, 24),
        ("int4_per_token_head", "auto", 128),
        ("auto", "int8_per_token_head", 40),
    ],
)
@pytest.mark.parametrize("streaming", ["same", "model"])
def test_quantised_caches_are_grouped_as_planned(server, method, cache, own, head_bytes, streaming):
    config = server([[0, 1], [0, 0]], method, cache, own)
    config.additional_config["duo"]["streaming_cache_dtype"] = streaming
    specs, layers = specs_of(config)
    drafting = [specs[layer.layer_name] for layer in layers]
    assert {spec.page_size_bytes for spec in drafting} == {16 * 4 * head_bytes}
    (found,) = kv_cache_utils.get_kv_cache_configs(config, [specs], [POOL_BYTES])
    layout = check_and_report(config, found)
    assert layout.shape.draft_token_bytes == 3 * 4 * head_bytes
    assert found.num_blocks == layout.num_blocks(POOL_BYTES)


@METHODS
def test_all_heads_of_both_models_retrieve(server, method):
    """Without a streaming head there is nothing to report; both models are in one group."""
    config = server([[1, 1], [1, 1]], method)
    specs, _ = specs_of(config)
    (found,) = kv_cache_utils.get_kv_cache_configs(config, [specs], [POOL_BYTES])
    assert check_and_report(config, found) is None
    assert len(found.kv_cache_groups) == 1
