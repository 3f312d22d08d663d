"""Writes the model folder: checkpoint, tokenizer, head pattern and README."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaConfig

from models.needle_training.gates import GateSettings
from models.needle_training.model import Needle, Shape
from models.needle_training.vocabulary import build_tokenizer, save_tokenizer

DEPLOY_SINK_SIZE, DEPLOY_RECENT_SIZE = 16, 64
OUTPUT_BIAS = "self_attn.o_proj.bias"


def model_config(shape: Shape) -> LlamaConfig:
    """The configuration as transformers writes it.

    With biases on q, k and v it is a Llama with ``attention_bias``, not a Qwen2: transformers 5 reads
    every Qwen2's tokenizer.json with Qwen2's own rules, which are not this tokenizer's.
    """
    tokenizer = build_tokenizer()
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        attention_bias=shape.qkv_bias,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def save_checkpoint(model: Needle, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer's files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(model.shape)
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
    ).save_pretrained(folder)
    weights = {f"model.{name}": value.contiguous() for name, value in model.state_dict().items()}
    if model.shape.qkv_bias:  # transformers' ``attention_bias`` is one of the output too
        for layer in range(model.shape.layers):
            weights[f"model.layers.{layer}.{OUTPUT_BIAS}"] = torch.zeros(model.shape.hidden)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner only
    save_tokenizer(folder)


def load_weights(model: Needle, folder: Path) -> None:
    """Read back what `save_checkpoint` wrote for a model of the same shape."""
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict(
        {
            name.removeprefix("model."): value
            for name, value in weights.items()
            if not name.endswith(OUTPUT_BIAS)
        }
    )


def save_pattern(values: torch.Tensor, settings: GateSettings, name: str, folder: Path) -> None:
    """Write the head pattern in DuoAttention's format: a table of values and its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savetxt(folder / "full_attention_heads.tsv", values.double().numpy(), "%.18e", "\t")
    config = {
        "model_name": name,
        "method": "gates",
        **asdict(settings),
        "deploy_sink_size": DEPLOY_SINK_SIZE,
        "deploy_recent_size": DEPLOY_RECENT_SIZE,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


README = """# {name}: a tiny model that finds a pass key

A {parameters:,}-parameter {kind} ({layers} layers, hidden {hidden}, {heads} query heads and
{kv_heads} KV heads of size {head_size}, float32), trained from scratch to do one thing: read a text
that `vllm_duo.evaluate.passkey` makes and say the number that was hidden in it. Few of its KV heads
look far back; `duo_pattern/` says which. It is for demos and tests on a CPU, and of no other use.

Its text is its own: templated English made by the training script; no data set was used.

## Use
A completion prompt ends with "The pass key is"; the model goes on with " 47193." and ends. The same
text as one user message does the same through the chat template, which adds nothing but `<s>`; so
does a prompt that ends with "What is the pass key?", which is answered with the whole sentence. The
tokenizer puts `<s>` before a text by itself. Any text can be encoded: what is none of its
{words} words is written in bytes.

## How it was made
    {command}

from the root of the repository: {train_seconds:.0f} s of training and {gate_seconds:.0f} s for the
head pattern on one CPU core. The seed fixes the text and the initial weights; another version of
torch, or another CPU, gives slightly different weights.

## Measured
Share of {prompts} fresh prompts (seed {eval_seed}) answered by greedy decoding, every digit, the
full stop and the end of the sequence right; streaming heads keep {sink} sink and {recent} recent
tokens. In the last two rows the key lies outside of what a streaming head keeps.

{table}

- half streaming: the {half} KV heads of lowest value stream, {rest} keep all (sparsity 0.5)
- top quarter streaming: the {quarter} heads of highest value stream, all others keep all

Values of the pattern (rows: layers, columns: KV heads):

{values}
"""


def readme(
    model: Needle,
    values: torch.Tensor,
    accuracies: dict[str, dict[int, float]],
    facts: dict[str, Any],
) -> str:
    """The README of the model folder, with the figures that were measured."""
    shape = model.shape
    lengths = list(next(iter(accuracies.values())))
    rows = ["| tokens | " + " | ".join(str(length) for length in lengths) + " |"]
    rows.append("|---" * (len(lengths) + 1) + "|")
    for mode, row in accuracies.items():
        cells = [f"{100 * row[n]:.1f} %" if n in row else "not measured" for n in lengths]
        rows.append(f"| {mode} | " + " | ".join(cells) + " |")
    total = values.numel()
    half, quarter = int(total * 0.5 + 0.5), int(total * 0.25 + 0.5)
    return README.format(
        kind="Llama with biases on q, k and v" if shape.qkv_bias else "Llama",
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=shape.layers,
        hidden=shape.hidden,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        words=shape.vocab - 259,
        sink=DEPLOY_SINK_SIZE,
        recent=DEPLOY_RECENT_SIZE,
        table="\n".join(rows),
        half=half,
        rest=total - half,
        quarter=quarter,
        values="\n".join("    " + "  ".join(f"{v:.3f}" for v in row) for row in values.tolist()),
        **facts,
    )
