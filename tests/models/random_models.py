"""Small random checkpoints with peaked attention: a wrong key changes the answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

MOE = {"num_experts_per_tok": 2}
NO_WINDOW = {"sliding_window": None}
FAMILIES = {
    # The start of transformers' class names, and what the configuration needs.
    "llama": ("Llama", {}),
    "mistral": ("Mistral", NO_WINDOW),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),  # qkv bias
    "qwen3": ("Qwen3", {"use_sliding_window": False}),  # q/k norm
    # q/k norm, more norms, its own RoPE for the layers that slide: all but every second one.
    "gemma3": ("Gemma3", {"sliding_window_pattern": 2}),
    "gemma": ("Gemma", {}),
    "granite": (  # multipliers at every turn
        "Granite",
        {
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.2,
        },
    ),
    "gpt_oss": (  # learned sinks, biases everywhere; layers that slide: all but every second one
        "GptOss",
        MOE | {"num_local_experts": 4, "pad_token_id": 0},
    ),
    "mixtral": ("Mixtral", NO_WINDOW | MOE | {"num_local_experts": 4}),
    "olmo2": ("Olmo2", {}),  # q/k norm over all heads, norms behind the layers
    "phi3": ("Phi3", NO_WINDOW | {"pad_token_id": 0}),  # one projection for q, k and v
    "qwen3_moe": ("Qwen3Moe", MOE | {"num_experts": 4, "moe_intermediate_size": 96}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "pad_token_id": 0}),  # layers without RoPE
    "stablelm": ("StableLm", {"partial_rotary_factor": 0.5}),  # layer norms with bias
    "starcoder2": ("Starcoder2", NO_WINDOW),  # biases everywhere
}
TIED = {"gemma", "starcoder2"}
"""Families whose checkpoints have no output embedding of their own."""
HIDDEN_FROM_HEADS = {"granite", "olmo2", "phi3", "qwen2", "smollm3", "stablelm", "starcoder2"}
"""Families for which vLLM derives the head size from the hidden size."""
EVERY_SECOND_SLIDES = {"gemma3", "gpt_oss"}
"""Families in which a window is that of the first, the third ... layer; else all layers have it."""
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
        some = self.family in EVERY_SECOND_SLIDES
        slides = [not some or layer % 2 == 0 for layer in range(LAYERS)]
        return [self.window if own else None for own in slides]


def make_model(shape: Shape, folder: Path, seed: int = 0) -> Path:
    """Write a float32 checkpoint of the given shape; returns its folder."""
    name, extra = FAMILIES[shape.family]
    config_name = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    heads = shape.group * shape.kv_heads
    hidden = heads * shape.head_size if shape.family in HIDDEN_FROM_HEADS else 128
    tied = shape.family in TIED
    if shape.window is not None:
        extra = extra | {"sliding_window": shape.window}
    if shape.family == "gemma3":
        extra = extra | {"query_pre_attn_scalar": shape.head_size}
    torch.manual_seed(seed)
    config = getattr(transformers, config_name)(
        hidden_size=hidden,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        **extra,
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).float()
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 3 * hidden**-0.5)
        if not tied:
            model.model.embed_tokens.weight.normal_(0, 1)
        for layer in model.model.layers:
            sharpen(layer.self_attn, shape, hidden)
    target = folder / shape.name
    model.save_pretrained(target)
    return target


def sharpen(attention: torch.nn.Module, shape: Shape, hidden: int) -> None:
    """Give one layer weights with which few keys get most of the attention."""
    width, kv_width = (n * shape.head_size for n in (shape.group * shape.kv_heads, shape.kv_heads))
    if shape.family == "phi3":
        weights = attention.qkv_proj.weight.split([width, kv_width, kv_width])
    else:
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights = [projection.weight for projection in projections]
        for projection in projections[:2]:
            if projection.bias is not None:
                projection.bias.normal_(0, 0.5)
    for weight, scale in zip(weights, (2, 2, 1), strict=True):
        weight.normal_(0, scale * hidden**-0.5)
    if shape.family == "gpt_oss":
        # As large as the logits of keys that get most of the attention.
        attention.sinks.normal_(2, 4)
    # Where input and output embeddings are one, a token's own would outweigh all attention.
    attention.o_proj.weight.normal_(0, (4 if shape.family in TIED else 1) * width**-0.5)
    for name in ("q_norm", "k_norm"):
        # A norm undoes the projections' scale: sharpen there. Gemma's multiply by one more.
        if hasattr(attention, name):
            getattr(attention, name).weight.fill_(1.0 if shape.family == "gemma3" else 2.0)
