"""What speculative decoding asks of a server's KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

DRAFTS_OF_TOKENS = ("ngram", "custom_class")
"""vLLM's methods that draft from tokens alone, without attention layers."""

DRAFT_MODEL = "draft_model"
"""vLLM's method that drafts with a model of its own, and the prefix of its layers' names."""


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """Drafts of a step; without speculative decoding there are none.

    Attributes:
        size: speculative tokens of a step at most: so many positions may be written and rolled back.
        token_bytes: bytes of one token in all layers of a draft model; 0 without one.
    """

    size: int = 0
    token_bytes: int = 0

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Self:
        """Those that a server was asked for."""
        speculation = vllm_config.speculative_config
        if speculation is None:
            return cls()
        model = draft_model_of(vllm_config)
        return cls(
            size=speculation.num_speculative_tokens,
            token_bytes=0 if model is None else _token_bytes(model),
        )


def draft_model_of(vllm_config: VllmConfig) -> ModelConfig | None:
    """The model that drafts, if one does."""
    speculation = vllm_config.speculative_config
    if speculation is None or speculation.method != DRAFT_MODEL:
        return None
    return speculation.draft_model_config


def is_draft_model(vllm_config: VllmConfig) -> bool:
    """Whether this is the config that vLLM makes for the draft model, not the server's own."""
    drafting = draft_model_of(vllm_config)
    return drafting is not None and drafting is vllm_config.model_config


def _token_bytes(model: ModelConfig) -> int:
    """Bytes of one token's keys and values in all layers: every head keeps every token."""
    layers, heads = model.get_total_num_hidden_layers(), model.get_total_num_kv_heads()
    return int(layers * heads * 2 * model.get_head_size() * model.dtype.itemsize)
