"""What speculative decoding asks of a server's KV cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from vllm_duo.kv_cache.formats import row_bytes
from vllm_duo.kv_cache.ranks import heads_per_rank

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

DRAFTS_OF_TOKENS = ("ngram", "custom_class")
"""vLLM's methods that draft from tokens alone."""

MEDUSA = "medusa"
"""vLLM's method that drafts with Medusa heads: a token each, from the model's last hidden state."""

DRAFTS_WITHOUT_CACHES = (*DRAFTS_OF_TOKENS, MEDUSA)
"""vLLM's methods that have no attention layers, so nothing of theirs lies in the KV cache."""

DRAFT_MODEL = "draft_model"
"""vLLM's method that drafts with a model of its own, its tag and the prefix of its layers' names."""

EAGLE_HEADS = ("eagle", "eagle3")
"""vLLM's methods that draft from the model's hidden states with a few layers more: an EAGLE head."""

DRAFTS_OF_LAYERS = (DRAFT_MODEL, *EAGLE_HEADS)
"""vLLM's methods whose drafts come from attention layers of their own."""

EAGLE_TAG = "eagle_head"
"""What vLLM tags an EAGLE head with while it builds one."""


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """Drafts of a step; without speculative decoding there are none.

    Attributes:
        size: speculative tokens of a step at most: so many positions may be written and rolled back.
        num_layers: of a draft model or an EAGLE head; 0 without one.
        num_kv_heads: of each of its layers.
        head_size: ``D`` of these heads, in elements.
        dtype_bytes: bytes of one number of its own dtype.
        row_bytes: bytes of one token in one of its heads where its cache is quantised
            (``CacheFormat.row_bytes``).
    """

    size: int = 0
    num_layers: int = 0
    num_kv_heads: int = 0
    head_size: int = 0
    dtype_bytes: int = 0
    row_bytes: int | None = None

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> Self:
        """Those that a server was asked for."""
        speculation = vllm_config.speculative_config
        if speculation is None:
            return cls()
        model = draft_model_of(vllm_config)
        if model is None:
            return cls(size=speculation.num_speculative_tokens)
        return cls(
            size=speculation.num_speculative_tokens,
            num_layers=model.get_total_num_hidden_layers(),
            num_kv_heads=model.get_total_num_kv_heads(),
            head_size=model.get_head_size(),
            dtype_bytes=model.dtype.itemsize,
            row_bytes=row_bytes(draft_cache_dtype(vllm_config), model.get_head_size()),
        )

    @property
    def head_bytes(self) -> int:
        """Bytes of one token's keys, values and scales in one of the drafting heads.

        Worked example: D = 64 in bf16: 256 bytes. With a byte for each number and two scales: 136.
        """
        return 2 * self.head_size * self.dtype_bytes if self.row_bytes is None else self.row_bytes

    @property
    def unquantised(self) -> Self:
        """The same with a cache of the drafting model's own dtype."""
        return replace(self, row_bytes=None)

    def token_bytes(self, ranks: int) -> int:
        """Bytes of one token in all layers of what drafts, on each of so many tensor-parallel ranks.

        Every head keeps every token; with more ranks than heads each rank has a copy of one.

        Worked example: 16 layers of 8 KV heads of 64 in bf16, 256 bytes a head: 32 KiB on one rank, 16
        KiB on two, 4 KiB on eight and on sixteen.
        """
        if not self.num_layers:
            return 0
        return self.num_layers * heads_per_rank(self.num_kv_heads, ranks) * self.head_bytes


NO_DRAFTS = Drafts()


def draft_model_of(vllm_config: VllmConfig) -> ModelConfig | None:
    """The draft model or EAGLE head, if one drafts."""
    speculation = vllm_config.speculative_config
    if speculation is None or speculation.method not in DRAFTS_OF_LAYERS:
        return None
    return speculation.draft_model_config


def draft_cache_dtype(vllm_config: VllmConfig) -> str:
    """The KV cache of what drafts, by vLLM's name: its own, or where it has none the server's."""
    own = vllm_config.speculative_config.kv_cache_dtype
    return str(own or vllm_config.cache_config.cache_dtype)


def is_made_for_drafts(vllm_config: VllmConfig) -> bool:
    """Whether vLLM has made this config for what drafts, not for the server.

    It is a copy of the server's, made once the model's layers are there; of an EAGLE head's even the
    model is the server's.
    """
    layers = vllm_config.compilation_config.static_forward_context
    return draft_model_of(vllm_config) is not None and bool(layers)


def builds_drafter() -> bool:
    """Whether vLLM is building what drafts right now, not the model; it tags what it builds."""
    from vllm.compilation import backends

    return backends.model_tag in (DRAFT_MODEL, EAGLE_TAG)


def is_drafting_layer(layer_name: str, num_layers: int) -> bool:
    """Whether a layer is a draft model's or an EAGLE head's.

    Args:
        layer_name: a draft model's begins with its method, an EAGLE head's layers are numbered on from
            the model's.
        num_layers: of the model.
    """
    from vllm.model_executor.models.utils import extract_layer_index

    return layer_name.startswith(f"{DRAFT_MODEL}.") or extract_layer_index(layer_name) >= num_layers
