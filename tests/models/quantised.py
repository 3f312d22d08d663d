"""Checkpoints with quantised weights in the formats that vLLM reads, and what they compute."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
GROUP = 32
"""Inputs that share a scale, in the formats with 4 bits."""

FORMATS = {
    "int8": {
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
    },
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    },
    "awq": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
    },
    "mxfp4": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            *("model.layers.*.self_attn", "model.layers.*.mlp.router"),
            *("model.embed_tokens", "lm_head"),
        ],
    },
}
"""What ``config.json`` says of each."""

CACHE_SCHEME = {
    "type": "float",
    "num_bits": 8,
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
}
"""compressed-tensors' words for a KV cache in fp8 with a scale of each layer's keys and its values."""

STEPS = 63
"""Greatest weight in int8. On CPUs without VNNI oneDNN adds pairs of products in 16 bits: up to 63 they
fit, up to 127 they do not and the served product is wrong by some per cent, with any backend."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the lower 3 bits of a 4-bit float stand for; the fourth is the sign."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight columns each 4 bits of an int32 hold, from the lowest."""


def quantise(model: Path, folder: Path, name: str = "int8") -> tuple[Path, Path]:
    """Write a checkpoint in one of ``FORMATS``, and the values that it stands for in float32.

    Returns:
        Folder of the quantised checkpoint, folder of the float32 one.
    """
    config = json.loads((model / "config.json").read_text())
    packed, plain = {}, {}
    chosen = ("_proj.weight",) if name != "mxfp4" else ("experts.gate_up_proj", "experts.down_proj")
    for key, weight in load_file(model / "model.safetensors").items():
        if not key.endswith(chosen):
            packed[key] = plain[key] = weight
            continue
        layer = key.removesuffix(".weight")
        tensors, plain[key] = PACKERS[name](weight)
        packed |= {f"{layer}{part}": tensor for part, tensor in tensors.items()}
    kinds = {name: (packed, {"quantization_config": FORMATS[name]}), "float32": (plain, {})}
    for kind, (weights, settings) in kinds.items():
        (folder / kind).mkdir(parents=True)
        (folder / kind / "config.json").write_text(json.dumps(config | settings))
        tensors = {each: tensor.contiguous() for each, tensor in weights.items()}
        save_file(tensors, folder / kind / "model.safetensors", metadata={"format": "pt"})
    return folder / name, folder / "float32"


def with_cache_scales(model: Path, folder: Path, scales: Sequence[tuple[float, float]]) -> Path:
    """Write a checkpoint of the same weights that asks for a KV cache in fp8.

    Args:
        model: whose weights it has.
        folder: to write into.
        scales: per layer of its keys and of its values.

    Returns:
        ``folder``.
    """
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": CACHE_SCHEME,
    }
    weights = load_file(model / "model.safetensors")
    for layer, (key, value) in enumerate(scales):
        for name, scale in (("k_scale", key), ("v_scale", value)):
            weights[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([scale])
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _int8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / STEPS
    steps = (weight / scale).round().to(torch.int8)
    return {".weight": steps, ".weight_scale": scale}, steps * scale


def _gptq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Eight inputs in an int32; the zero of all groups is 8, stored less one."""
    steps, scales = _grouped(weight.T, zero=8)
    inputs, outputs = steps.shape
    tensors = {
        ".qweight": _pack(steps.view(inputs // 8, 8, outputs).transpose(1, 2)),
        ".qzeros": _pack(torch.full((inputs // GROUP, outputs // 8, 8), 7)),
        ".scales": scales,
        ".g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }
    return tensors, ((steps - 8) * scales.repeat_interleave(GROUP, 0)).T


def _awq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Eight outputs in an int32; every second output has a zero of its own."""
    zeros = torch.tensor([8, 7]).repeat(weight.shape[0] // 2)
    steps, scales = _grouped(weight.T, zeros)
    inputs, outputs = steps.shape
    in_order = torch.tensor(AWQ_ORDER)
    tensors = {
        ".qweight": _pack(steps.view(inputs, outputs // 8, 8)[..., in_order]),
        ".qzeros": _pack(zeros.view(-1, 8)[:, in_order].expand(inputs // GROUP, -1, -1)),
        ".scales": scales,
    }
    return tensors, ((steps - zeros) * scales.repeat_interleave(GROUP, 0)).T


def _mxfp4(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Of [experts, inputs, outputs]: two 4-bit floats in a byte, an exponent for every 32 inputs."""
    groups = weight.transpose(1, 2).unflatten(2, (-1, GROUP))
    exponents = groups.abs().amax(-1, keepdim=True).log2().floor() - 2
    scales = torch.exp2(exponents)
    values = torch.tensor(E2M1)
    steps = ((groups / scales).abs()[..., None] - values).abs().argmin(-1)
    signs = groups < 0
    nibbles = (steps + 8 * signs).to(torch.uint8)
    tensors = {
        "_blocks": nibbles[..., ::2] | nibbles[..., 1::2] << 4,
        "_scales": (exponents[..., 0] + 127).to(torch.uint8),
    }
    plain = values[steps] * (1 - 2 * signs.float()) * scales
    return tensors, plain.flatten(2).transpose(1, 2)


PACKERS = {"int8": _int8, "gptq": _gptq, "awq": _awq, "mxfp4": _mxfp4}


def _grouped(weight: torch.Tensor, zero: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps of 0 to 15 and scales of a weight of [inputs, outputs]: [inputs, outputs] int64 and
    [inputs / GROUP, outputs], of values that bfloat16 holds."""
    groups = weight.view(-1, GROUP, weight.shape[1])
    scales = (groups.abs().amax(1) / 7).bfloat16().float()
    steps = (weight / scales.repeat_interleave(GROUP, 0)).round().long() + zero
    return steps.clamp(0, 15), scales


def _pack(steps: torch.Tensor) -> torch.Tensor:
    """[..., 8] of 0 to 15, the first in the lowest 4 bits: [...] int32."""
    packed = (steps << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def quantise_inputs(model: torch.nn.Module) -> None:
    """Let a transformers model round the inputs of its projections as the one served in int8 does: each
    token's to 127 steps of its own greatest."""

    def rounded(module, inputs):
        (values,) = inputs
        scale = values.abs().amax(-1, keepdim=True) / 127
        return ((values / scale).round() * scale,)

    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(rounded)
