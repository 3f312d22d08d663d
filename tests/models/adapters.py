"""Random LoRA adapters in PEFT's file format, and checkpoints with an adapter merged in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 8
ALPHA = 16
SCALE = 0.5
"""Size of an adapter's change beside the weight that it changes: large enough for other answers."""


def make_adapter(model: Path, folder: Path, seed: int) -> Path:
    """Write an adapter for every projection of a checkpoint; returns its folder.

    Format: PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, ``A`` [rank, inputs] and
    ``B`` [outputs, rank] by module.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] not in TARGETS:
            continue
        outputs, inputs = weight.shape
        size = SCALE * float(weight.std()) * RANK**0.5 / ALPHA
        for key, shape, std in (("A", (RANK, inputs), 1.0), ("B", (outputs, RANK), size)):
            tensors[f"base_model.model.{module}.lora_{key}.weight"] = std * torch.randn(
                shape, generator=generator
            )
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"bias": "none"}))
    return folder


def merge(model: Path, adapter: Path, folder: Path) -> Path:
    """Write the checkpoint with ``alpha / rank * B A`` added to each adapted weight; its folder."""
    weights = load_file(model / "model.safetensors")
    change = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in change if ".lora_A." in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        product = change[name.replace(".lora_A.", ".lora_B.")] @ change[name]
        weights[f"{module}.weight"] += ALPHA / RANK * product
    folder.mkdir(parents=True)
    shutil.copy(model / "config.json", folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
