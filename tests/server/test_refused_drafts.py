"""Speculative decoding that a server refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import get_args

import pytest
from vllm.config.speculative import SpeculativeMethod

from tests.server.configs import LLAMA, MISTRAL, cache_scheme, draft_model, reasons_of
from vllm_duo import support

METHODS = set(get_args(SpeculativeMethod))
TESTED = {"ngram", "custom_class", "medusa", "draft_model", "eagle", "eagle3"}


# An EAGLE head is a draft model in vLLM's own words.
LAYERS = pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3"])


def drafting(method, async_scheduling=False, drafts=4):
    """What of a server's config says how it drafts."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(method=method, num_speculative_tokens=drafts),
        scheduler_config=SimpleNamespace(async_scheduling=async_scheduling),
    )


def why(method):
    return (
        f"speculative decoding by {method!r}: not tested yet; use one of ngram, custom_class, "
        "medusa, draft_model, eagle, eagle3 or remove --speculative-config"
    )


@pytest.mark.refused("speculative decoding, MTP and the like")
@pytest.mark.parametrize("method", sorted(METHODS - TESTED))
def test_every_other_way_to_draft(method):
    assert list(support._speculation(drafting(method))) == [why(method)]


@pytest.mark.parametrize(
    ("config", "drafts", "reason"),
    [
        (
            LLAMA,
            {"method": "eagle", "kv_cache_dtype": "bfloat16"},
            "kv_cache_dtype bfloat16 for a model in float32: use auto",
        ),
        (LLAMA | {"head_dim": 24}, {"method": "eagle3"}, "the head size 24: supported are"),
        (
            LLAMA | {"sliding_window": 32},
            {"method": "eagle3"},
            "the model's own sliding window (2 of 2 layers slide over",
        ),
        (LLAMA, {"parallel_drafting": True}, "drafting in parallel is not tested"),
        (LLAMA, {"attention_backend": "CPU_ATTN"}, "the attention backend CPU_ATTN: all"),
        (LLAMA, {"kv_cache_dtype": "nvfp4"}, "kv_cache_dtype nvfp4: use one of auto, float16,"),
        (LLAMA | {"head_dim": 24}, {}, "the head size 24: supported are"),
        (
            MISTRAL,
            {},
            "the model's own sliding window (2 of 2 layers slide over 32 tokens): the heads",
        ),
    ],
)
def test_draft_model(serve, tmp_path, config, drafts, reason):
    given = draft_model(tmp_path / "draft", config | {"pard_token": 1}, **drafts)
    (found,) = reasons_of(serve, speculative_config=given)
    assert found.startswith(f"what drafts: {reason}")


@LAYERS
def test_draft_model_with_heads_that_cannot_be_split(serve, tmp_path, method):
    config = LLAMA | {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
    drafts = draft_model(tmp_path / "draft", config, method=method)
    (reason,) = reasons_of(serve, speculative_config=drafts, tensor_parallel_size=2)
    assert reason.startswith("what drafts: 3 KV heads cannot be split over 2 ranks")


@LAYERS
def test_draft_model_on_fewer_ranks(serve, tmp_path, method):
    drafts = draft_model(tmp_path / "draft", method=method, draft_tensor_parallel_size=1)
    (reason,) = reasons_of(serve, speculative_config=drafts, tensor_parallel_size=2)
    assert reason == (
        "what drafts: draft_tensor_parallel_size 1: it runs on the model's 2 ranks, leave it out"
    )


@LAYERS
def test_draft_model_in_several_stages(serve, tmp_path, method):
    drafts = draft_model(tmp_path / "draft", method=method)
    reasons = reasons_of(serve, speculative_config=drafts, pipeline_parallel_size=2)
    assert (
        "what drafts: --pipeline-parallel-size 2 is not tested with one; use ngram or set it to 1"
        in reasons
    )


@LAYERS
def test_draft_model_beside_a_cache_of_the_checkpoint(serve, tmp_path, method):
    drafts = draft_model(tmp_path / "draft", method=method)
    (reason,) = reasons_of(serve, config=LLAMA | cache_scheme(), speculative_config=drafts)
    assert reason == (
        "what drafts: not tested beside a checkpoint that asks for a KV cache in fp8; use ngram"
    )


@LAYERS
def test_draft_model_beside_layers_that_are_left_out(serve, tmp_path, method):
    drafts = draft_model(tmp_path / "draft", method=method)
    cache = {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]}
    (reason,) = reasons_of(serve, speculative_config=drafts, **cache)
    assert reason == (
        "what drafts: --kv-cache-dtype-skip-layers means layers of the model and would mean layers "
        "that draft as well: leave it out or use ngram"
    )


def test_drafts_with_steps_planned_ahead():
    (reason,) = support._speculation(drafting("ngram", async_scheduling=True))
    assert reason.endswith("use --no-async-scheduling")


def test_drafts_on_a_gpu_are_as_many_as_its_decode_kernel_takes(platform):
    """More would be prefills, which no full graph may hold: their launches depend on the lengths."""
    assert list(support._speculation(drafting("ngram", drafts=8))) == []
    platform("cuda")
    assert list(support._speculation(drafting("ngram", drafts=7))) == []
    (reason,) = support._speculation(drafting("ngram", drafts=8))
    assert reason.startswith("speculative decoding on a GPU with 8 drafts: its decode kernel")
    assert reason.endswith("takes 7 at most: set num_speculative_tokens to that or fewer")
