"""Small random checkpoints with peaked attention: a wrong key changes the answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": False}),  # qkv bias
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"use_sliding_window": False}),  # q/k norm
    # q/k norm, more norms, its own RoPE for the layers that slide: all but every second one.
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"sliding_window_pattern": 2}),
}
VOCABULARY = 512
LAYERS = 3


@dataclass(frozen=True)
class Shape:
    """What decides the checkpoint, apart from the seed."""

    family: str = "llama"
    group: int = 2  # query heads per KV head
    head_size: int = 32
    kv_heads: int = 2
    window: int | None = None  # of the model's own, in tokens

    @property
    def name(self) -> str:
        slides = f"-w{self.window}" * (self.window is not None)
        return f"{self.family}-g{self.group}-d{self.head_size}-k{self.kv_heads}{slides}"

    @property
    def windows(self) -> list[int | None]:
        """Of each layer."""
        slides = [self.family != "gemma3" or layer % 2 == 0 for layer in range(LAYERS)]
        return [self.window if own else None for own in slides]


def make_model(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """Write a float32 checkpoint of the given shape; returns its folder."""
    config_class, model_class, extra = FAMILIES[shape.family]
    heads = shape.group * shape.kv_heads
    # vLLM's Qwen2 derives the head size from the hidden size.
    hidden = heads * shape.head_size if shape.family == "qwen2" else 128
    if shape.window is not None:
        extra = extra | {"sliding_window": shape.window}
    if shape.family == "gemma3":
        extra = extra | {"query_pre_attn_scalar": shape.head_size}
    torch.manual_seed(seed)
    model = model_class(
        config_class(
            hidden_size=hidden,
            intermediate_size=192,
            num_hidden_layers=LAYERS,
            num_attention_heads=heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_size,
            vocab_size=VOCABULARY,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
            **extra,
        )
    ).float()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 1)
        model.lm_head.weight.normal_(0, 3 * hidden**-0.5)
        for layer in model.model.layers:
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj):
                projection.weight.normal_(0, 2 * hidden**-0.5)
                if projection.bias is not None:
                    projection.bias.normal_(0, 0.5)
            attention.v_proj.weight.normal_(0, hidden**-0.5)
            attention.o_proj.weight.normal_(0, (heads * shape.head_size) ** -0.5)
            if shape.family == "qwen3":
                # The norm undoes the projections' scale: sharpen here instead.
                attention.q_norm.weight.fill_(2.0)
                attention.k_norm.weight.fill_(2.0)
            if shape.family == "gemma3":
                # Likewise; its norms multiply by one more than their weight.
                attention.q_norm.weight.fill_(1.0)
                attention.k_norm.weight.fill_(1.0)
    target = folder / shape.name
    model.save_pretrained(target)
    return target
