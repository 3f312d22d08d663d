"""PyTorch implementation of ``quantise`` and ``dequantise``.

Numbers are rounded to the nearest, ties to even. Float8 saturates at the format's greatest number and
keeps NaN; a token's own scale is its greatest magnitude over the greatest number, so that nothing
saturates, and is NaN or infinite where the token is.

Four bits have room for few outliers, and keys have some in the same channels of every token. They are
therefore rotated first (QuaRot, arXiv:2404.00456): signs, then Hadamard's matrix in blocks of the
largest power of two that divides the head size. Queries are rotated alike and outputs back, so
attention stays what it is.
"""

from __future__ import annotations

import math

import torch

from vllm_duo.kv_cache.formats import CacheFormat

LEAST_SCALE = 1e-30
"""Scales below this are this: a token of zeros has one that can be divided by."""

SIGN_HASH = 0x9E3779B1
"""Bit 15 of an element's index times this says whether its sign is flipped."""

_FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def quantise(
    key: torch.Tensor,
    value: torch.Tensor,
    form: CacheFormat,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> torch.Tensor:
    """Rows of a cache for keys and values.

    Args:
        key: [..., D], any float dtype.
        value: [..., D].
        form: the cache's format.
        key_scale: of the layer, where the format has no scales of its own.
        value_scale: likewise.

    Returns:
        [..., ``form.row_bytes(D)``] uint8.
    """
    keys, key_scales = _numbers(key, form, key_scale)
    values, value_scales = _numbers(value, form, value_scale)
    parts = [keys, values]
    if form.token_scales:
        parts.append(torch.cat([key_scales, value_scales], -1).view(torch.uint8))
    return torch.cat(parts, -1)


def dequantise(
    rows: torch.Tensor,
    form: CacheFormat,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a cache's rows.

    Args:
        rows: [..., ``form.row_bytes(D)``] uint8.
        form: the cache's format.
        key_scale: of the layer, where the format has no scales of its own.
        value_scale: likewise.

    Returns:
        Keys and values, [..., D] float64 each.
    """
    size = (rows.shape[-1] - form.scale_bytes) // 2
    keys, values = _read(rows[..., :size], form), _read(rows[..., size : 2 * size], form)
    if not form.token_scales:
        return keys * key_scale, values * value_scale
    scales = rows[..., 2 * size :].contiguous().view(torch.float32).double()
    keys, values = keys * scales[..., :1], values * scales[..., 1:]
    if _is_rotated(form):
        return _rotate(keys, back=True), _rotate(values, back=True)
    return keys, values


def _numbers(
    tensor: torch.Tensor, form: CacheFormat, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers [..., D] uint8 and scales [..., 1] float32."""
    tensor = tensor.float()
    if _is_rotated(form):
        tensor = _rotate(tensor)
    if form.token_scales:
        scales = (tensor.abs().amax(-1, keepdim=True) / form.greatest).clamp(min=LEAST_SCALE)
    else:
        scales = torch.full_like(tensor[..., :1], scale)
    scaled = (tensor * (1.0 / scales)).clamp(-form.greatest, form.greatest)
    if form.number == "int8":
        return scaled.round().to(torch.int8).view(torch.uint8), scales
    if form.number == "int4":
        numbers = scaled.round().to(torch.int8).view(torch.uint8)
        low, high = numbers[..., ::2], numbers[..., 1::2]
        return (low & 15) | (high << 4), scales
    return scaled.to(_FLOAT8[form.number]).view(torch.uint8), scales


def _read(numbers: torch.Tensor, form: CacheFormat) -> torch.Tensor:
    """[..., D] float64 of the stored numbers, without their scales."""
    numbers = numbers.contiguous()
    if form.number == "int4":
        pairs = torch.stack([numbers << 4, numbers & 0xF0], -1).flatten(-2).view(torch.int8)
        return pairs.double() / 16
    return numbers.view(torch.int8 if form.number == "int8" else _FLOAT8[form.number]).double()


def _is_rotated(form: CacheFormat) -> bool:
    return form.number == "int4"


def _rotate(tensor: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """Rotate [..., D], or rotate back, in the tensor's dtype."""
    size = tensor.shape[-1]
    hashed = (torch.arange(size) * SIGN_HASH) % 2**32
    signs = 1.0 - 2.0 * ((hashed >> 15) & 1).to(tensor.dtype)
    if not back:
        tensor = tensor * signs
    block = size & -size
    distance = 1
    while distance < block:
        pairs = tensor.reshape(*tensor.shape[:-1], -1, 2, distance)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        tensor = torch.stack([first + second, first - second], -2).reshape(tensor.shape)
        distance *= 2
    tensor = tensor * torch.tensor(1.0 / math.sqrt(block), dtype=tensor.dtype)
    return tensor * signs if back else tensor
