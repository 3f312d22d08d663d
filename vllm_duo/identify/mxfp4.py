"""Weights in MXFP4, as gpt-oss is published: plain numbers are made of them while they load.

Every device computes and differentiates those, and nothing but transformers is needed. Two 4-bit floats
lie in a byte of `..._blocks`, and each 32 of them share an exponent in `..._scales`; bfloat16 holds all
such values exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn


def is_mxfp4(config: Any) -> bool:
    """Whether the checkpoint of this configuration has such weights."""
    settings = getattr(config, "quantization_config", None) or {}
    if not isinstance(settings, dict):
        settings = settings.to_dict()
    return bool(settings.get("quant_method") == "mxfp4")


def loading_arguments(config: Any) -> dict[str, Any]:
    """What `from_pretrained` is told beside the usual."""
    if not is_mxfp4(config):
        return {}
    from transformers import Mxfp4Config

    return {"quantization_config": Mxfp4Config(dequantize=True)}


def unify(model: nn.Module, dtype: torch.dtype) -> None:
    """Give unpacked weights, which transformers leaves in bfloat16, the dtype of the others."""
    for weight in model.parameters():
        if weight.dtype == torch.bfloat16:
            weight.data = weight.data.to(dtype)


def plain_numbers(files: Iterable[Path]) -> int:
    """How many numbers the safetensors files hold once they are plain; 0: one of them is damaged."""
    try:
        return sum(_plain_numbers(file) for file in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0  # transformers says what is wrong with it


def _plain_numbers(file: Path) -> int:
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return sum(
        prod(tensor["shape"]) * (2 if name.endswith("_blocks") else 1)
        for name, tensor in header.items()
        if name != "__metadata__" and not name.endswith("_scales")
    )
