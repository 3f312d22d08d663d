"""config.json files of models that a server is asked to serve, and what it says of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.models.quantised import CACHE_SCHEME

PATTERN = "0.0\t1.0\n1.0\t0.25\n"  # 2 layers, 2 KV heads
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
}


def config_json(architecture: str, model_type: str, **settings) -> dict:
    return {"architectures": [architecture], "model_type": model_type, **SIZES, **settings}


def cache_scheme(**settings) -> dict:
    """A checkpoint that asks for its own KV cache."""
    scheme = CACHE_SCHEME | settings
    quantisation = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
    return {"quantization_config": quantisation | {"ignore": [], "kv_cache_scheme": scheme}}


LLAMA = config_json("LlamaForCausalLM", "llama")
MISTRAL = config_json("MistralForCausalLM", "mistral", sliding_window=32)
GEMMA_2 = config_json("Gemma2ForCausalLM", "gemma2", head_dim=16, sliding_window=32)
GEMMA_3 = config_json(
    "Gemma3ForCausalLM", "gemma3_text", head_dim=16, sliding_window=32, sliding_window_pattern=2
)
GEMMA_3N = config_json("Gemma3nForCausalLM", "gemma3n_text", head_dim=16, sliding_window=32)
FULL = {"layer_types": ["full_attention", "full_attention"]}
LLAMA_4 = config_json("Llama4ForCausalLM", "llama4_text", head_dim=16, num_local_experts=2)
CHUNKED = {"attention_chunk_size": 64, "layer_types": ["chunked_attention", "full_attention"]}
BLOOM = config_json("BloomForCausalLM", "bloom", n_layer=2, n_head=4, seq_length=256)
FALCON = config_json("FalconForCausalLM", "falcon", alibi=True)
GPT_OSS = config_json(
    "GptOssForCausalLM", "gpt_oss", head_dim=16, num_local_experts=2, sliding_window=32
)
JAMBA = config_json("JambaForCausalLM", "jamba", attn_layer_period=2, attn_layer_offset=1)
DEEPSEEK = config_json("DeepseekV2ForCausalLM", "deepseek_v2", n_routed_experts=2, q_lora_rank=None)
MLA = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
WHISPER = config_json("WhisperForConditionalGeneration", "whisper", d_model=64)
ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 4, "max_source_positions": 64}
DECODER = {"decoder_layers": 2, "decoder_attention_heads": 4, "max_target_positions": 256}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}

IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
IMAGES |= {"image_size": 16, "patch_size": 8}


def multimodal_json(architecture: str, model_type: str, text_type: str, **settings) -> dict:
    """Text and images, each with a part of the file."""
    text = {"model_type": text_type, **SIZES, **settings.pop("text", {})}
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "text_config": text,
        "vision_config": IMAGES,
    }
    return config | settings


LLAVA = multimodal_json(
    "LlavaForConditionalGeneration", "llava", "llama", image_token_index=60, image_seq_length=4
)
GEMMA_3_IMAGES = multimodal_json(
    *("Gemma3ForConditionalGeneration", "gemma3", "gemma3_text"),
    text={"head_dim": 16, "sliding_window": 32, "sliding_window_pattern": 2},
)
PALIGEMMA = multimodal_json(
    *("PaliGemmaForConditionalGeneration", "paligemma", "gemma"), text={"head_dim": 16}
)
IDEFICS_3 = multimodal_json(
    "Idefics3ForConditionalGeneration", "idefics3", "llama", image_token_id=60
)
# As published: the text's keys stand beside the tower's part.
QWEN_2_VL = config_json(
    "Qwen2VLForConditionalGeneration",
    "qwen2_vl",
    vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64},
    rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
    use_sliding_window=False,
    sliding_window=32,
)


def draft_model(folder: Path, config: dict = LLAMA, size: int = 2, **settings) -> dict:
    """``--speculative-config`` of a draft model that is written into the folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    given = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": size}
    return given | settings


def reasons_of(serve, *args, **settings) -> list[str]:
    with pytest.raises(NotImplementedError, match="does not support this server") as caught:
        serve(*args, **settings)
    return re.findall(r"^  - (.*)$", str(caught.value), flags=re.MULTILINE)
