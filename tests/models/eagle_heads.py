"""EAGLE heads made of copies of the model's own layers, so that they are often right."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

LAYERS = "model.layers."
HINT = 0.1
"""Share of the model's hidden states in what a head starts from: enough to change some drafts."""
SHARP = 4.0
"""Scale of queries and keys with which a token attends to itself alone."""


def make_head(model: Path, method: str, folder: Path) -> Path:
    """Write a head that predicts with the model's own layers, every head of which sees every token.

    It is wrong where the model's streaming heads make a difference, and a little everywhere: no head
    sees a request's first token, and this one adds the model's hidden states to the embeddings.

    Args:
        model: folder of a Llama.
        method: "eagle" or "eagle3", vLLM's names.
        folder: to write into.

    Returns:
        The head's folder.
    """
    weights = load_file(model / "model.safetensors")
    config = AutoConfig.from_pretrained(model)
    hidden, own = config.hidden_size, {}
    first = 0 if method == "eagle" else 1
    for name, weight in weights.items():
        if name.startswith(LAYERS):
            index, rest = name.removeprefix(LAYERS).split(".", 1)
            own[f"layers.{int(index) + first}.{rest}"] = weight
    if method == "eagle":
        # vLLM's head has no norm before its first layer; all embeddings are about as long.
        norm = own.pop("layers.0.input_layernorm.weight")
        norm = norm / weights["model.embed_tokens.weight"].square().mean().sqrt()
        for projection in "qkv":
            own[f"layers.0.self_attn.{projection}_proj.weight"] *= norm
        own["fc.weight"] = torch.cat([torch.eye(hidden), HINT * torch.eye(hidden)], dim=1)
    else:
        # What vLLM would take by itself are three different ones of some numbers of layers only.
        config.eagle_aux_hidden_state_layer_ids = [0, 1, 2]
        copy_kv_heads(config, own)
        own |= embedding_layer(config)
        own["fc.weight"] = torch.cat([torch.eye(hidden)] * 3, dim=1)
        own["layers.0.hidden_norm.weight"] = torch.full((hidden,), HINT)
        own["norm.weight"] = weights["model.norm.weight"]
        # Of a model with tied embeddings these are its output embeddings, too.
        own["lm_head.weight"] = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    config.num_hidden_layers += first
    config.norm_before_residual = True
    target = folder / f"{model.name}-{method}"
    config.save_pretrained(target)
    save_file(
        {name: weight.contiguous().clone() for name, weight in own.items()},
        target / "model.safetensors",
    )
    return target


def copy_kv_heads(config, layers: dict[str, torch.Tensor]) -> None:
    """Give an EAGLE-3 head a KV head for each part of the embedding, by copies of its own.

    Args:
        config: of the head, changed in place.
        layers: its weights by name, changed in place.
    """
    copies, rest = divmod(config.hidden_size, config.num_key_value_heads * config.head_dim)
    assert rest == 0, "as many parts of the embedding as KV heads, or a multiple"
    for name, weight in layers.items():
        if "k_proj." in name or "v_proj." in name:
            heads = weight.unflatten(0, (config.num_key_value_heads, config.head_dim))
            layers[name] = heads.repeat_interleave(copies, dim=0).flatten(0, 1)
    config.num_key_value_heads *= copies


def embedding_layer(config) -> dict[str, torch.Tensor]:
    """First layer of an EAGLE-3 head that adds the token's embedding to what the head starts from.

    Its input is the embedding beside the hidden state. Each token attends to itself alone and takes
    over its embedding, which the attention's dimensions must have room for.
    """
    hidden, inner = config.hidden_size, config.num_key_value_heads * config.head_dim
    assert inner == hidden, "a KV head for each part of the embedding"
    group = config.num_attention_heads // config.num_key_value_heads
    parts = torch.eye(hidden).reshape(config.num_key_value_heads, config.head_dim, hidden)
    embedding = torch.cat([torch.eye(hidden), torch.zeros(hidden, hidden)], dim=1)
    queries = parts.repeat_interleave(group, dim=0).reshape(-1, hidden)
    mlp = torch.zeros(config.intermediate_size, hidden)
    layer = {
        "input_layernorm.weight": torch.ones(hidden),
        "post_attention_layernorm.weight": torch.ones(hidden),
        "self_attn.q_proj.weight": SHARP * queries @ embedding,
        "self_attn.k_proj.weight": SHARP * embedding,
        "self_attn.v_proj.weight": embedding,
        # Each group of query heads hands over the same part.
        "self_attn.o_proj.weight": queries.T / group,
        "mlp.gate_proj.weight": mlp,
        "mlp.up_proj.weight": mlp,
        "mlp.down_proj.weight": mlp.T,
    }
    if config.attention_bias:
        for name in ("q", "k", "v", "o"):
            width = layer[f"self_attn.{name}_proj.weight"].shape[0]
            layer[f"self_attn.{name}_proj.bias"] = torch.zeros(width)
    return {f"layers.0.{name}": weight for name, weight in layer.items()}
