"""A layer's own word on its KV cache, as vLLM leaves it once weights have loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.model_executor.layers.attention.attention import set_default_quant_scales
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsKVCacheMethod,
)
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8KVCacheMethod

from tests.models.quantised import CACHE_SCHEME
from vllm_duo.attention.layer_cache import check_format, check_scales

OTHER_SCALES = pytest.mark.refused("quantised KV cache, other scales of the checkpoint")


def loaded(method, dtype="fp8", **scales):
    """A layer after vLLM's own steps, with these scales in the checkpoint."""
    layer = torch.nn.Module()
    layer.kv_cache_dtype, layer.num_kv_heads = dtype, 4
    set_default_quant_scales(layer, register_buffer=True)
    method.create_weights(layer)
    for name, scale in scales.items():
        parameter = getattr(layer, f"{name}_scale")
        parameter.data = torch.tensor(scale, dtype=torch.float32).reshape(parameter.shape)
    method.process_weights_after_loading(layer)
    return layer


def compressed(**settings):
    scheme = CACHE_SCHEME | settings
    config = CompressedTensorsConfig.from_config(
        {"format": "dense", "config_groups": {}, "ignore": [], "kv_cache_scheme": scheme}
    )
    return CompressedTensorsKVCacheMethod(config)


def fp8():
    return Fp8KVCacheMethod(Fp8Config())


@pytest.mark.parametrize("method", [compressed(), fp8()], ids=["compressed-tensors", "fp8"])
class TestScales:
    def test_of_keys_and_values(self, method):
        layer = loaded(method, k=0.37, v=1.5)
        check_scales("layer", layer)
        assert (layer._k_scale_float, layer._v_scale_float) == pytest.approx((0.37, 1.5))

    def test_none_are_1(self, method):
        layer = loaded(method)
        check_scales("layer", layer)
        assert (layer._k_scale_float, layer._v_scale_float) == (1, 1)

    @OTHER_SCALES
    def test_of_queries_are_refused(self, method):
        with pytest.raises(
            NotImplementedError, match=r"a scale of its queries \(0.5\), which duo's"
        ):
            check_scales("layer", loaded(method, k=0.37, v=1.5, q=0.5))

    @pytest.mark.parametrize("dtype", ["auto", "int8_per_token_head"])
    def test_that_are_not_in_use_are_no_matter(self, method, dtype):
        check_scales("layer", loaded(method, dtype, k=0.37, v=1.5, q=0.5))

    @pytest.mark.parametrize("scale", [float("nan"), float("inf")])
    def test_that_nothing_can_be_divided_by(self, method, scale):
        layer = loaded(method, k=1.5, v=1.5)
        layer._v_scale_float = scale
        with pytest.raises(ValueError, match=f"a scale of {scale} of its values, expected more"):
            check_scales("layer", layer)


def test_scales_of_probabilities_are_refused():
    layer = loaded(fp8(), k=0.37, v=1.5)
    layer._prob_scale.fill_(0.5)
    with pytest.raises(NotImplementedError, match=r"a scale of its probabilities \(0.5\)"):
        check_scales("layer", layer)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scales_below_the_least(scale):
    with pytest.raises(ValueError, match=f"a scale of {scale} of its keys, expected more than 0"):
        check_scales("layer", loaded(compressed(), k=scale, v=1.5))


@OTHER_SCALES
def test_scales_of_each_head_are_refused():
    """The start check has them; a layer may still have been built with such."""
    scales = [0.5, 1.0, 1.5, 2.0]
    layer = loaded(compressed(strategy="attn_head"), k=scales, v=scales)
    with pytest.raises(NotImplementedError, match="has 4 scales of its keys, one of each head"):
        check_scales("layer", layer)


@pytest.mark.parametrize(
    ("own", "planned", "fits"),
    [
        ("fp8", "fp8", True),
        ("fp8", "fp8_e4m3", True),
        ("auto", "bfloat16", True),
        ("auto", "fp8", False),
        ("fp8", "auto", False),
        ("fp8", "int8_per_token_head", False),
    ],
)
def test_cache_that_was_not_planned_is_refused(own, planned, fits):
    layer = SimpleNamespace(kv_cache_dtype=own)
    if fits:
        check_format("layer", layer, planned)
        return
    with pytest.raises(NotImplementedError, match=f"a KV cache of {own}, expected {planned} by"):
        check_format("layer", layer, planned)
