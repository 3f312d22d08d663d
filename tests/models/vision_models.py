"""Small random multimodal checkpoints: a decoder with peaked attention behind an image tower."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.models.random_models import LAYERS, VOCABULARY, sharpen

HIDDEN, HEAD_SIZE, HEADS, KV_HEADS = 256, 32, 8, 4
IMAGE = 500
"""Token that stands for an image in a prompt; vLLM makes as many of it as the image has."""

WORDS = range(3, 400)
"""Tokens that stand for nothing but themselves."""

TOKENS_OF_PICTURE = {
    "llava": 196,
    "qwen2_vl": 182,
    "qwen2_5_vl": 182,
    "mistral3": 195,
    "gemma3": 16,
}
"""Tokens of one ``picture``: more than a ring of 95, and several blocks."""


def picture(seed: int) -> Image.Image:
    """A picture of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (208, 224, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@dataclass(frozen=True)
class Family:
    """What differs from family to family.

    Attributes:
        name: transformers' class names begin with it.
        config: makes the configuration from the text's settings.
        images: makes the image processor, on PIL.
        specials: names of special tokens.
        around: tokens before and after an image.
        rename: makes a checkpoint's name of a weight from transformers' own.
    """

    name: str
    config: Callable[[dict[str, Any]], Any]
    images: Callable[[], Any]
    specials: dict[str, int]
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    rename: Callable[[str], str] = str


def _clip(text):
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "image_size": 112, "patch_size": 8},
        ),
        text_config=transformers.LlamaConfig(head_dim=HEAD_SIZE, **text),
        image_token_index=IMAGE,
    )


def _pixtral(text):
    return transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(
            **{"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "image_size": 224, "patch_size": 8},
        ),
        text_config=transformers.MistralConfig(head_dim=HEAD_SIZE, sliding_window=None, **text),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def _siglip(text):
    return transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(
            **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "image_size": 64, "patch_size": 8},
        ),
        text_config=transformers.Gemma3TextConfig(
            **{"head_dim": HEAD_SIZE, "query_pre_attn_scalar": HEAD_SIZE},
            **{"sliding_window": 64, "sliding_window_pattern": 2},
            **text,
        ),
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
    )


def _qwen(vision, **settings):
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    patches = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}

    def config(text, kind):
        return kind(
            vision_config={"depth": 2, "num_heads": 2, **patches, **vision},
            text_config={**text, "rope_parameters": rope},
            **dict(zip(tokens, range(IMAGE, IMAGE + 4), strict=True)),
        )

    return config


_QWEN2 = _qwen({"embed_dim": 64, "hidden_size": HIDDEN, "mlp_ratio": 2})
_QWEN2_5 = _qwen(
    {
        **{"hidden_size": 64, "out_hidden_size": HIDDEN, "intermediate_size": 128},
        **{"window_size": 64, "fullatt_block_indexes": [1]},
    }
)
_QWEN = SimpleNamespace(
    images=lambda: transformers.Qwen2VLImageProcessorPil(
        **{"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2},
        size={"shortest_edge": 256, "longest_edge": 65536},
    ),
    specials={
        **{"<|image_pad|>": IMAGE, "<|video_pad|>": 501},
        **{"<|vision_start|>": 502, "<|vision_end|>": 503},
    },
    around=((502,), (503,)),
)

FAMILIES = {
    "llava": Family(
        "Llava",
        _clip,
        lambda: transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}
        ),
        {"<image>": IMAGE},
        # As published checkpoints have it, and vLLM expects.
        rename=lambda name: name.replace("vision_tower.", "vision_tower.vision_model."),
    ),
    "qwen2_vl": Family(
        "Qwen2VL",
        lambda text: _QWEN2(text, transformers.Qwen2VLConfig),
        _QWEN.images,
        _QWEN.specials,
        _QWEN.around,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VL",
        lambda text: _QWEN2_5(text, transformers.Qwen2_5_VLConfig),
        _QWEN.images,
        _QWEN.specials,
        _QWEN.around,
    ),
    "mistral3": Family(
        "Mistral3",
        _pixtral,
        lambda: transformers.PixtralImageProcessorPil(patch_size=8, size={"longest_edge": 224}),
        {"[IMG]": IMAGE, "[IMG_BREAK]": 501, "[IMG_END]": 502},
    ),
    "gemma3": Family(
        "Gemma3",
        _siglip,
        lambda: transformers.Gemma3ImageProcessorPil(size={"height": 64, "width": 64}),
        {"<image_soft_token>": IMAGE, "<start_of_image>": 501, "<end_of_image>": 502},
    ),
}


TEXT = {
    **{"hidden_size": HIDDEN, "intermediate_size": 192, "num_hidden_layers": LAYERS},
    **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS},
    **{"vocab_size": VOCABULARY, "max_position_embeddings": 4096},
    **{"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False},
}
"""Of every decoder."""


def make_vision_model(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a float32 checkpoint of a family, with all that reads prompts; returns its folder."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    config = family.config(TEXT)
    model = getattr(transformers, f"{family.name}ForConditionalGeneration")(config).float()
    shape = SimpleNamespace(
        family=name, group=HEADS // KV_HEADS, head_size=HEAD_SIZE, kv_heads=KV_HEADS
    )
    decoder = model.model.language_model
    with torch.no_grad():
        for part, module in model.model.named_children():
            # Images as loud as words, and unlike each other.
            for weight in module.parameters() if part != "language_model" else ():
                if weight.dim() > 1:
                    weight.normal_(0, 1.5 * weight[0].numel() ** -0.5)
        decoder.embed_tokens.weight.normal_(0, 1)
        model.lm_head.weight.normal_(0, 3 * HIDDEN**-0.5)
        model.lm_head.weight[IMAGE:] = 0  # no special token is ever the answer
        for layer in decoder.layers:
            sharpen(layer.self_attn, shape, HIDDEN)
    target = folder / name
    model.save_pretrained(target)
    weights = load_file(target / "model.safetensors")
    renamed = {family.rename(weight): value for weight, value in weights.items()}
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
    _save_processor(name, family, target)
    return target


def make_decoder(model: Path, folder: Path) -> Path:
    """Write the decoder of a multimodal checkpoint as a Llama; returns its folder."""
    weights = {
        name.removeprefix("language_model."): weight
        for name, weight in load_file(model / "model.safetensors").items()
        if name.startswith(("language_model.", "model.", "lm_head."))
    }
    biases = any(name.endswith("q_proj.bias") for name in weights)
    if biases:
        # Qwen2 has none behind the attention, a Llama all or none.
        for layer in range(LAYERS):
            weights[f"model.layers.{layer}.self_attn.o_proj.bias"] = torch.zeros(HIDDEN)
    config = transformers.LlamaConfig(head_dim=HEAD_SIZE, attention_bias=biases, **TEXT)
    config.architectures = ["LlamaForCausalLM"]
    target = folder / f"{model.name}-decoder"
    config.save_pretrained(target)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _save_processor(name: str, family: Family, target: Path) -> None:
    """Words are ``t3``, ``t4`` and so on, split at blanks; special tokens are found within words."""
    begin, end, unknown = "<s>", "</s>", "<unk>"
    words = {begin: 0, end: 1, unknown: 2} | {f"t{token}": token for token in range(3, IMAGE)}
    tokenizer = Tokenizer(models.WordLevel(words | family.specials, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{"bos_token": begin, "eos_token": end, "unk_token": unknown, "pad_token": unknown},
        additional_special_tokens=list(family.specials),
    )
    if name == "llava":
        transformers.LlavaProcessor(
            family.images(),
            fast,
            **{"patch_size": 8, "vision_feature_select_strategy": "default"},
            **{"image_token": "<image>", "num_additional_image_tokens": 1},
        ).save_pretrained(target)
    else:
        fast.save_pretrained(target)
        family.images().save_pretrained(target)
