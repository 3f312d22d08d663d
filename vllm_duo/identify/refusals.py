"""Which models the attention hook cannot stand in for, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vllm_duo.model_facts import MULTIMODAL
from vllm_duo.windows import (
    SLIDING,
    UNKNOWN,
    Windows,
    describe,
    in_force,
    layer_windows,
    slides_throughout,
)

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest relative difference of the last hidden states with our attention and the model's own."""


TEXT_TESTED = (*MULTIMODAL, "gemma3")
"""Multimodal model types whose heads are found from text alone."""


def text_of(config: Any) -> Any:
    """The part of a configuration that is the decoder's; the whole of it in a text model."""
    return config.get_text_config(decoder=True)


def model_class(config: Any) -> Any:
    """The class of transformers that answers in text with this configuration; None: there is none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    return None


def config_reasons(config: Any) -> Iterator[str]:
    """Why a model of this configuration cannot be hooked, before its weights load."""
    whole = config
    if (
        getattr(whole, "vision_config", None) or getattr(whole, "audio_config", None)
    ) and whole.model_type not in TEXT_TESTED:
        yield (
            f"multimodal input (model type {whole.model_type}): not tested, expected one of "
            f"{', '.join(TEXT_TESTED)}"
        )
        return
    config = text_of(whole)

    def setting(name: str) -> Any:
        return getattr(config, name, None)

    heads = setting("num_attention_heads")
    if not heads:
        yield "it has no attention layers"
        return
    if setting("is_encoder_decoder"):
        yield "cross-attention (an encoder-decoder model): duo serves decoders alone"
    if setting("kv_lora_rank"):
        yield "multi-head latent attention (MLA): its cache has no KV heads to split"
    if setting("attn_logit_softcapping"):
        yield "soft-capped attention logits: duo's kernels do not cap them"
    if setting("attention_chunk_size"):
        yield (
            f"chunked local attention ({setting('attention_chunk_size')} tokens): duo's kernels attend "
            "to all tokens, or to a sink and the recent ones"
        )
    if setting("num_kv_shared_layers"):
        yield (
            "layers that share another layer's KV cache: with duo each layer has caches of its own"
        )
    if setting("alibi") or setting("use_alibi"):
        yield "ALiBi position biases: duo's kernels add none"
    yield from _window_reasons(config)
    found = model_class(whole)
    if found is None:
        yield "transformers has no causal language model for it"
    elif not getattr(found, "_supports_attention_backend", False):
        yield "its attention does not go through transformers' AttentionInterface"


def _window_reasons(config: Any) -> Iterator[str]:
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds - {SLIDING}:
        yield f"layers of other kinds ({', '.join(sorted(kinds - {SLIDING}))})"
        return
    windows = windows_of(config)
    if windows is None:
        yield UNKNOWN
    elif slides_throughout(windows):
        yield (
            f"{describe(windows)} of the model's own: every head streams, and there is "
            "nothing to choose; serve it without a pattern"
        )


def windows_of(config: Any) -> Windows | None:
    """The model's own sliding windows that are in force within the positions it is made for.

    None: it has some, which are not known.
    """
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    kinds = getattr(config, "layer_types", None)
    found = layer_windows(config.num_hidden_layers, window, kinds)
    if found is None or (not window and SLIDING in (kinds or ())):
        return None
    return in_force(found, getattr(config, "max_position_embeddings", None) or 2**31)


def probe_reasons(
    seen: dict[int, tuple[int, int, int]], expected: Tensor, found: Tensor, weight: Tensor
) -> list[str]:
    """Why a model cannot be hooked, after a short text went through it twice.

    Args:
        seen: query heads, KV heads and head size by layer, as the hook saw them.
        expected: last hidden states with the model's own attention.
        found: with the hook's.
        weight: any weight, for its dtype.
    """
    if not seen:
        return ["it has no attention layers that go through transformers' AttentionInterface"]
    if len(set(seen.values())) > 1:
        shapes = ", ".join(sorted(f"{q}/{kv} heads of size {d}" for q, kv, d in set(seen.values())))
        return [f"layers of different shapes ({shapes}): a pattern has one width"]
    difference = float((found - expected).norm() / expected.norm())
    limit = PROBE_TOLERANCE.get(weight.dtype, 8e-2)
    if not difference <= limit:
        return [
            "its attention is more than causal softmax attention: the last hidden states differ by "
            f"{difference:.2g} from those of its own attention, expected at most {limit:g}"
        ]
    return []


def refuse(name: str, config: Any, reasons: list[str]) -> None:
    """Refuse a model for all of its reasons.

    Raises:
        NotImplementedError: there are reasons.
    """
    if reasons:
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        kind = (getattr(config, "architectures", None) or [config.model_type])[0]
        raise NotImplementedError(f"model {name} ({kind}) is not supported:\n{listed}")
