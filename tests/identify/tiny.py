"""Small models for the identification tests, with the needle model's tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

NEEDLE = Path(__file__).resolve().parents[2] / "models" / "needle"
SINK, RECENT = 4, 12
DIGITS = [str(digit) for digit in range(10)]


def tokenizer():
    return AutoTokenizer.from_pretrained(NEEDLE)


def random_llama(*, layers=2, heads=4, kv_heads=2, seed=0, **more):
    """A Llama whose heads all look far and matter."""
    return _random_model(
        (LlamaConfig, LlamaForCausalLM),
        seed,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=False,
        **more,
    )


def sliding_gemma(window, seed=0):
    """A Gemma 3 text model of three layers, the first and the last of which slide."""
    return _random_model(
        (Gemma3TextConfig, Gemma3ForCausalLM),
        seed,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        query_pre_attn_scalar=8,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )


def sliding_gpt_oss(window, seed=0, **more):
    """A gpt-oss of three layers, the first and the last of which slide; its sinks get much."""
    model = _random_model(
        (GptOssConfig, GptOssForCausalLM),
        seed,
        **{
            **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
            **{"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": window},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "tie_word_embeddings": False,
            **more,
        },
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_(1, 2)
    return model


def _random_model(family, seed, **settings):
    """Random weights with peaked attention; embeddings that the head does not share have size 1."""
    config_class, model_class = family
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "head_dim": 8,
        "max_position_embeddings": 1024,
    }
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = config_class(**(sizes | tokens | settings))
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
        if not config.tie_word_embeddings:
            model.model.embed_tokens.weight.normal_(0, 1)
    return model


def copying_llama():
    """One layer, two KV heads: head 0 fetches the digits from anywhere, head 1's output is unused.

    The first coordinate of every embedding is 1 and the second is 1 for digits. Head 0's queries are
    constant and its keys are large for digits, both in the pair of coordinates that RoPE turns least.
    """
    model = random_llama(
        layers=1, heads=2, kv_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 1e12}
    )
    words = tokenizer()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings[:, 0] = 1.0
        embeddings[:, 1] = 0.0
        embeddings[words.convert_tokens_to_ids(DIGITS), 1] = 1.0
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            projection.weight.zero_()
        attention.q_proj.weight[3, 0] = 10.0
        attention.k_proj.weight[3, 1] = 10.0
        attention.v_proj.weight[:8, 8:16] = torch.eye(8)
        attention.v_proj.weight[8:16, 8:16] = torch.eye(8)
        attention.o_proj.weight[8:16, :8] = 10.0 * torch.eye(8)  # of head 1 nothing is used
        model.model.layers[0].mlp.down_proj.weight.zero_()
    return model


def save(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
