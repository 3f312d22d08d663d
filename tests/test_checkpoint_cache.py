"""The KV cache that a quantization_config asks for, as vLLM reads it."""

from __future__ import annotations

import pytest
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsKVCacheMethod,
)
from vllm.utils.torch_utils import get_kv_cache_quant_algo_string

from tests.models.quantised import CACHE_SCHEME as SCHEME
from vllm_duo.checkpoint_cache import CheckpointCache, checkpoint_cache, find_quantisation
from vllm_duo.model_facts import ModelFacts, draft_refusals


def compressed(scheme) -> dict:
    return {"quant_method": "compressed-tensors", "kv_cache_scheme": scheme}


@pytest.mark.parametrize("method", ["compressed-tensors", "compressed_tensors"])
def test_scheme_of_one_scale_a_layer(method):
    found = checkpoint_cache(compressed(SCHEME) | {"quant_method": method})
    assert found == CheckpointCache(dtype="fp8")
    CompressedTensorsKVCacheMethod.validate_kv_cache_scheme(SCHEME)


@pytest.mark.parametrize("quantisation", [{}, compressed(None), {"quant_method": "gptq"}])
def test_no_cache_of_its_own(quantisation):
    assert checkpoint_cache(quantisation) == CheckpointCache()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"strategy": "attn_head"}, "each head's own (strategy attn_head)"),
        (
            {"strategy": "channel"},
            "expected one scale a layer (strategy tensor), got strategy channel",
        ),
        ({"strategy": None}, "got strategy None"),
        (
            {"type": "int"},
            "expected 8-bit floats (type float, num_bits 8), got type int, num_bits 8",
        ),
        ({"num_bits": 4}, "got type float, num_bits 4"),
        ({"symmetric": False}, "zero points"),
        ({"dynamic": True}, "found while it runs (dynamic)"),
    ],
)
def test_schemes_that_are_refused(change, problem):
    assert problem in checkpoint_cache(compressed(SCHEME | change)).problem


def test_scheme_that_is_no_dictionary():
    assert checkpoint_cache(compressed("fp8")).problem == "expected a dictionary, got 'fp8'"


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"kv_cache_quant_algo": "FP8"},
        {"kv_cache_quant_algo": "NVFP4"},
        {"kv_cache_quant_algo": "INT8"},
        {"kv_cache_scheme": SCHEME},
        {"kv_cache_scheme": SCHEME | {"dynamic": True}},
        {"kv_cache_scheme": {"type": "float", "num_bits": 4}},
        {"kv_cache_scheme": {"type": "int", "num_bits": 8}},
        {"kv_cache_scheme": SCHEME, "kv_cache_quant_algo": "NVFP4"},
    ],
)
@pytest.mark.parametrize("nested", [True, False])
def test_modelopt_as_vllm_reads_it(keys, nested):
    keys = {"quant_algo": "FP8", **keys}
    config = {"quant_method": "modelopt"} | ({"quantization": keys} if nested else keys)
    theirs = get_kv_cache_quant_algo_string(config)
    assert checkpoint_cache(config).dtype == (theirs or "auto")


def test_modelopts_own_file_names_it_as_the_producer():
    config = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
    }
    assert checkpoint_cache(config).dtype == "fp8_e4m3"


def test_where_it_stands():
    one, other, older = ({"quant_method": name} for name in "abc")
    text, both = {"quantization_config": other}, {"quantization_config": one}
    assert find_quantisation(both | {"compression_config": older}, text) is one
    assert find_quantisation({"compression_config": older}, text) is other
    assert find_quantisation({"compression_config": older}) is older
    assert find_quantisation({}) == {}


def test_what_drafts_has_the_models_numbers():
    own = CheckpointCache(dtype="fp8")
    facts = ModelFacts(name="drafts", num_layers=2, num_kv_heads=2, head_size=16, own_cache=own)
    (reason,) = draft_refusals(facts, 1)
    assert reason.startswith("what drafts: the checkpoint's own KV cache quantisation (fp8)")
