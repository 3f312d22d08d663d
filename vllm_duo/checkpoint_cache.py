"""The KV cache that a checkpoint asks for: a format of its own, with scales among its weights.

Where ``--kv-cache-dtype`` is ``auto`` vLLM 0.32 takes the format from ``quantization_config``: of
compressed-tensors' ``kv_cache_scheme`` while it builds the layers (``Attention.__init__``), of
ModelOpt's keys as it reads the flags (``get_kv_cache_quant_algo_string``). The same is read here from
config.json alone. No vLLM, no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COMPRESSED_TENSORS = "compressed-tensors"
MODELOPT = "modelopt"


@dataclass(frozen=True, kw_only=True)
class CheckpointCache:
    """What a checkpoint says of the KV cache.

    Attributes:
        dtype: what ``--kv-cache-dtype auto`` becomes, in vLLM's words; "auto": the model's numbers.
        problem: why duo cannot keep such a cache, if so.
    """

    dtype: str = "auto"
    problem: str | None = None


NO_CACHE = CheckpointCache()
"""Of a checkpoint that says nothing."""


def find_quantisation(
    outer: Mapping[str, Any], text: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """The part of a config.json that describes how the checkpoint is quantised; empty: it is not.

    Args:
        outer: the file.
        text: its part for text, where it has several.
    """
    places = (
        outer.get("quantization_config"),
        (text or {}).get("quantization_config"),
        # compressed-tensors' older key.
        outer.get("compression_config"),
    )
    return next((found for found in places if isinstance(found, Mapping)), {})


def checkpoint_cache(quantisation: Mapping[str, Any]) -> CheckpointCache:
    """What a ``quantization_config`` says of the KV cache.

    Worked example: compressed-tensors' ``{"type": "float", "num_bits": 8, "strategy": "tensor",
    "symmetric": true, "dynamic": false}`` is "fp8": E4M3 with one scale of each layer's keys and one of
    its values.
    """
    method = str(quantisation.get("quant_method", "")).lower().replace("_", "-")
    scheme = quantisation.get("kv_cache_scheme")
    if method == COMPRESSED_TENSORS:
        if scheme is None:
            return NO_CACHE
        return CheckpointCache(dtype="fp8", problem=_problem(scheme))
    inner = quantisation.get("quantization", quantisation)
    inner = inner if isinstance(inner, Mapping) else {}
    producer = quantisation.get("producer")
    made_by = producer.get("name") if isinstance(producer, Mapping) else None
    if not (method.startswith(MODELOPT) or made_by == MODELOPT or "modelopt_quant_config" in inner):
        return NO_CACHE
    found = (
        inner.get("kv_cache_scheme")
        or scheme
        or inner.get("kv_cache_quant_algo")
        or quantisation.get("kv_cache_quant_algo")
    )
    return CheckpointCache(dtype=_modelopt_dtype(found))


def _problem(scheme: object) -> str | None:
    """Why duo cannot keep the cache of a ``kv_cache_scheme``, if so."""
    if not isinstance(scheme, Mapping):
        return f"expected a dictionary, got {scheme!r}"
    strategy = scheme.get("strategy")
    kind = (scheme.get("type"), scheme.get("num_bits"))
    if kind != ("float", 8):
        return f"expected 8-bit floats (type float, num_bits 8), got type {kind[0]}, num_bits {kind[1]}"
    if strategy == "attn_head":
        return (
            "its scales are each head's own (strategy attn_head), and duo has one of a layer's keys "
            "and one of its values (strategy tensor)"
        )
    if strategy != "tensor":
        return f"expected one scale a layer (strategy tensor), got strategy {strategy}"
    if scheme.get("dynamic"):
        return (
            "its scales are found while it runs (dynamic), and vLLM reads scales from the checkpoint "
            "or takes 1"
        )
    if not scheme.get("symmetric"):
        return "its scales have zero points (symmetric false)"
    return None


def _modelopt_dtype(found: object) -> str:
    """The cache dtype of ModelOpt's words; what it does not know it leaves to the model."""
    if isinstance(found, Mapping):
        bits, is_float = found.get("num_bits"), found.get("type") == "float"
        if is_float and bits == 8 and found.get("dynamic") is False:
            return "fp8_e4m3"
        return "nvfp4" if is_float and bits == 4 else "auto"
    names = {"fp8": "fp8_e4m3", "nvfp4": "nvfp4"}
    return names.get(found.lower(), "auto") if isinstance(found, str) else "auto"
