"""Which models can be hooked, and what the others are told."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from transformers import AutoConfig

from tests.identify import tiny
from vllm_duo.identify.model import fingerprint, hook_model, load_model
from vllm_duo.identify.policies import full_policy
from vllm_duo.identify.refusals import config_reasons

SIZES = {
    "vocab_size": 678,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
SLIDE = ["sliding_attention", "full_attention"]
SUPPORTED = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Mixtral": {"sliding_window": None, "num_local_experts": 4},
    "Qwen2": {},
    "Qwen3": {},
    "Phi3": {"sliding_window": None},
    "Gemma": {},
}


@pytest.mark.parametrize("window", [1, 8, 20])
def test_layers_that_slide_compute_the_models_own_attention(window):
    """Hooking holds its output against the model's own, over texts longer than the window."""
    hooked = hook_model(tiny.sliding_gemma(window), tiny.tokenizer(), "g", torch.device("cpu"))
    assert hooked.info.windows == (window, None, window)
    assert hooked.info.chosen_layers == [1]
    seen = []

    def policy(layer, *others):
        seen.append(layer)
        return full_policy(layer, *others)

    ids = torch.arange(60)[None] % 678
    found = hooked.hidden(ids, policy)
    assert seen == [1]
    model = tiny.sliding_gemma(window)
    with torch.no_grad():
        expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        wider = hook_model(
            tiny.sliding_gemma(window + 1), tiny.tokenizer(), "g", torch.device("cpu")
        ).hidden(ids, full_policy)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert (wider - expected).abs().max() > 0.01, "one token more must be seen"


@pytest.mark.parametrize("family", sorted(SUPPORTED))
def test_family_is_hooked_without_a_change_of_its_output(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **SUPPORTED[family])
    assert list(config_reasons(config)) == []
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids = torch.arange(60)[None] % 678
    with torch.no_grad():
        expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hooked = hook_model(model, tiny.tokenizer(), family, torch.device("cpu"))
        found = hooked.hidden(ids, full_policy)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    info = hooked.info
    assert (info.num_layers, info.num_heads, info.num_kv_heads, info.head_size) == (2, 4, 2, 8)


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("mamba", {}, "no attention layers"),
        ("deepseek_v3", {}, "MLA"),
        ("gemma2", {}, "soft-capped"),
        ("mistral", {"sliding_window": 128}, "32 of 32 layers slide over 128 tokens .* nothing to"),
        # The config names layers that slide and not, or not all, over how many tokens.
        ("qwen2", {"layer_types": SLIDE, "num_hidden_layers": 2}, "sizes are not known"),
        ("gemma3_text", {"sliding_window": None}, "sizes are not known"),
        (
            "lfm2",
            {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
            r"layers of other kinds \(conv\)",
        ),
        ("t5", {}, "encoder-decoder"),
        ("mpt", {}, "AttentionInterface"),
        ("bloom", {}, "AttentionInterface"),
    ],
)
def test_unsupported_model_is_refused_for_its_reason(kind, more, reason):
    reasons = list(config_reasons(AutoConfig.for_model(kind, **more)))
    assert any(re.search(reason, text) for text in reasons), reasons


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mistral", {"sliding_window": 4096, "max_position_embeddings": 4096}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 128}),
    ],
)
def test_window_that_never_bites_is_fine(kind, more):
    assert list(config_reasons(AutoConfig.for_model(kind, **more))) == []


def test_attention_that_does_more_is_refused():
    """A model whose own attention adds something that the hook does not know of."""
    model = tiny.random_llama()

    def biased(module, query, key, value, mask, scaling, **more):
        output = transformers.models.llama.modeling_llama.eager_attention_forward(
            module, query, key, value, mask, scaling, **more
        )[0]
        return output * 1.5, None

    transformers.AttentionInterface.register("tests_biased", biased)
    model.set_attn_implementation("tests_biased")
    with pytest.raises(NotImplementedError, match=r"(?s)tiny \(llama\).*more than causal softmax"):
        hook_model(model, tiny.tokenizer(), "tiny", torch.device("cpu"))


def test_loading_refuses_by_name_before_weights_load(tmp_path):
    AutoConfig.for_model("gemma2").save_pretrained(tmp_path)
    with pytest.raises(
        NotImplementedError, match=r"not supported:\n  - soft-capped attention logits"
    ):
        load_model(str(tmp_path), device="cpu", dtype=None)


def test_no_such_model_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"expected a local folder or a model"):
        load_model("no-such/model-at-all", device="cpu", dtype=None)
    with pytest.raises(ValueError, match=r"found no config\.json"):
        load_model(str(tmp_path), device="cpu", dtype=None)


def test_no_such_device_is_told(model_folder):
    with pytest.raises(ValueError, match=r"--device cuda:99.*use cpu"):
        load_model(str(model_folder), device="cuda:99", dtype=None)


def test_fingerprint_tells_weights_apart():
    model = tiny.random_llama()
    before = fingerprint(model)
    assert fingerprint(tiny.random_llama()) == before
    assert fingerprint(tiny.random_llama(seed=1)) != before


def test_dtype_is_what_was_asked_for(model_folder):
    model = load_model(str(model_folder), device="cpu", dtype="bfloat16")
    assert next(model.model.parameters()).dtype == torch.bfloat16
