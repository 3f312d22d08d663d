"""Models and patterns to plan for: config.json files of known shapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from vllm_duo.heads import HeadPattern
from vllm_duo.planning.schema import LengthPlan, MemoryPlan

GIB = 2**30
TOKENS = 32_768


def write_model(
    folder: Path, layers: int, heads: int, kv_heads: int, hidden: int, **settings
) -> str:
    """A config.json as these models have it; head size 128 unless told."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "max_position_embeddings": 131_072,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | settings))
    return str(folder)


def checkered(folder: Path, layers: int, kv_heads: int) -> str:
    """A pattern in which every other head is a retrieval head, shifted by one from layer to layer."""
    layer, head = np.indices((layers, kv_heads))
    HeadPattern(((layer + head) % 2).astype(float)).save(folder)
    return str(folder)


def by_length(plan: MemoryPlan, tokens: int) -> LengthPlan:
    (found,) = (length for length in plan.by_length if length.tokens == tokens)
    return found
