"""What the backend and its layers refuse, apart from what the front end already has."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import AttentionType, subclass_attention_backend

from vllm_duo.attention import impl, specs
from vllm_duo.attention.backend import DuoAttentionBackend
from vllm_duo.attention.metadata import DuoMetadataBuilder
from vllm_duo.config import DuoConfig, resolve
from vllm_duo.heads import HeadPattern
from vllm_duo.server_plan import ServerPlan


class Config(SimpleNamespace):
    """Stands for a VllmConfig, of which a layer's constructor needs no more than its identity."""

    __hash__ = object.__hash__


@pytest.fixture
def config(monkeypatch):
    pattern = HeadPattern(np.array([[0.0, 1.0], [1.0, 0.0]]))
    plan = ServerPlan(pattern, resolve(DuoConfig(), pattern))
    config = Config(speculative_config=None, device_config=SimpleNamespace(device_type="cpu"))
    monkeypatch.setattr(impl, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(specs, "resolve_plan", lambda _: plan)
    return config


def make_layer(num_kv_heads=2, **arguments):
    return impl.DuoAttentionImpl(4, 32, 1.0, num_kv_heads, **arguments)


def test_vllms_wrapped_layers_are_refused():
    """Such wrappers make layers non-causal or chunked, which the operators would not notice."""
    with pytest.raises(NotImplementedError, match="wraps as PrefixDuoAttentionBackend"):
        subclass_attention_backend("Prefix", DuoAttentionBackend, DuoMetadataBuilder)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi slopes"),
        ({"logits_soft_cap": 30.0}, "soft-capped logits"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "attention type"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "another layer's KV cache"),
        ({"kv_cache_dtype": "nvfp4"}, "a nvfp4 KV cache"),
        ({"chunk_lookback": 2}, "the argument chunk_lookback"),
    ],
)
def test_layer_features_are_refused_before_weights_load(config, arguments, reason):
    with pytest.raises(NotImplementedError, match=reason):
        make_layer(**arguments)


@pytest.mark.parametrize("shape", [(2,), (8,), (4, 1)])
def test_sinks_of_other_heads_are_refused(config, shape):
    with pytest.raises(ValueError, match=r"expected \[4\], one of each of its query heads"):
        make_layer(sinks=torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_are_those_of_the_weights_that_were_loaded_last(config, dtype):
    parameter = torch.nn.Parameter(torch.full((4,), torch.nan, dtype=dtype))
    layer = make_layer(sinks=parameter)
    layer.heads = "split before"
    context = {"model.layers.0.attn": SimpleNamespace(impl=layer, kv_cache_dtype="auto")}
    config.compilation_config = SimpleNamespace(static_forward_context=context)
    for value in (1.5, -2.0):
        parameter.data.fill_(value)
        layer.process_weights_after_loading(dtype)
        assert layer.sinks.dtype == torch.float32
        assert layer.sinks.tolist() == [value] * 4
    assert layer.sinks.data_ptr() != parameter.data_ptr(), (
        "sleeping takes a parameter's memory away"
    )


@pytest.mark.parametrize(
    ("planned", "own", "message"),
    [
        ((), 32, "a sliding window of 32 tokens, expected none"),
        ((), 63, "a sliding window of 63 tokens, expected none"),
        ((16, None), 32, "a sliding window of 32 tokens, expected 16"),
        ((None, 16), 32, "a sliding window of 32 tokens, expected none"),
        ((16, None), None, "a sliding window of no tokens, expected 16"),
    ],
)
def test_window_that_the_config_does_not_tell_is_refused(config, planned, own, message):
    config.model_config = SimpleNamespace(original_max_model_len=64, max_model_len=64)
    layer = make_layer(sliding_window=own)
    plan = replace(specs.plan_of(config), windows=planned)
    with pytest.raises(NotImplementedError, match=message):
        layer._check_window(plan, "model.layers.0.attn", 0)


@pytest.mark.parametrize("own", [None, 0, 64, 4096])
def test_window_that_hides_nothing_is_none(config, own):
    config.model_config = SimpleNamespace(original_max_model_len=64, max_model_len=64)
    layer = make_layer(sliding_window=own)
    assert layer._check_window(specs.plan_of(config), "model.layers.0.attn", 0) is None


def test_draft_models_window_is_refused(config, monkeypatch):
    monkeypatch.setattr(impl, "builds_drafter", lambda: True)
    with pytest.raises(NotImplementedError, match="a draft model or EAGLE head with a sliding w"):
        make_layer(sliding_window=32)


def test_layer_with_other_kv_heads_is_refused_before_weights_load(config):
    with pytest.raises(ValueError, match="a layer has 1 KV heads, the head pattern 2"):
        make_layer(num_kv_heads=1)


def test_plan_is_forgotten_with_its_config(config, monkeypatch):
    """A process that makes one engine after another must get the first one's memory back."""
    configs = [Config(**vars(config))]
    monkeypatch.setattr(impl, "get_current_vllm_config", lambda: configs[0])
    layer, watch, key = make_layer(), weakref.ref(configs[0]), id(configs[0])
    assert key in specs._plans
    del layer
    configs.clear()
    gc.collect()
    assert watch() is None
    assert key not in specs._plans


def test_pattern_without_the_layer_is_named():
    pattern = HeadPattern.uniform(2, 2)
    plan = ServerPlan(pattern, resolve(DuoConfig(), pattern))
    with pytest.raises(ValueError, match="has 2 layers, the model has a layer 2"):
        plan.retrieval_mask(2)


def test_sizes_beyond_the_longest_request_cost_nothing():
    pattern = HeadPattern(np.array([[0.0, 1.0]]))
    plan = ServerPlan(pattern, resolve(DuoConfig(sink_size=2**29, recent_size=2**29), pattern))
    layout = plan.layout(head_size=32, dtype_bytes=4, block_size=16, max_model_len=256)
    assert (layout.span.sink_size, layout.span.recent_size) == (256, 256)
    assert layout.span.max_blocks <= 32
