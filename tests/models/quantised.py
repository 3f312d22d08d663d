"""Checkpoints with int8 weights and inputs in compressed-tensors' format, and what they compute."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
SETTINGS = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}


STEPS = 63
"""Greatest weight in int8. On CPUs without VNNI oneDNN adds pairs of products in 16 bits: up to 63 they
fit, up to 127 they do not and the served product is wrong by some per cent, with any backend."""


def quantise(model: Path, folder: Path) -> tuple[Path, Path]:
    """Write a checkpoint in int8, with a scale a row of each weight, and its values in float32.

    Returns:
        Folder of the int8 checkpoint, folder of the float32 one.
    """
    config = json.loads((model / "config.json").read_text())
    packed, plain = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            packed[name] = plain[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / STEPS
        packed[name] = (weight / scale).round().to(torch.int8)
        packed[f"{name}_scale"] = scale
        plain[name] = packed[name] * scale
    kinds = {"int8": (packed, {"quantization_config": SETTINGS}), "float32": (plain, {})}
    for kind, (weights, settings) in kinds.items():
        (folder / kind).mkdir(parents=True)
        (folder / kind / "config.json").write_text(json.dumps(config | settings))
        save_file(weights, folder / kind / "model.safetensors", metadata={"format": "pt"})
    return folder / "int8", folder / "float32"


def quantise_inputs(model: torch.nn.Module) -> None:
    """Let a transformers model round the inputs of its projections as the served one does: each token's
    to 127 steps of its own greatest."""

    def rounded(module, inputs):
        (values,) = inputs
        scale = values.abs().amax(-1, keepdim=True) / 127
        return ((values / scale).round() * scale,)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(rounded)
