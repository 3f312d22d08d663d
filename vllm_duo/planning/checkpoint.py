"""A model's facts from its config.json: in a folder, or in Hugging Face's cache without a network.

Keys are read as vLLM 0.32 reads them (``ModelArchConfigConvertorBase``); what a file leaves out is what
transformers 5 takes for that model type. For model types that are not in ``DEFAULTS`` the keys that
count must be there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, StrictInt, StrictStr, ValidationError

from vllm_duo.checkpoint_cache import checkpoint_cache, find_quantisation
from vllm_duo.model_facts import ModelFacts
from vllm_duo.windows import SLIDING, Windows, layer_windows

CONFIG_NAME = "config.json"
QUANTISATION_NAME = "hf_quant_config.json"

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen2_moe": {"num_key_value_heads": 16, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    "qwen3_moe": {"num_key_value_heads": 4, "sliding_window": 4096},
    "phi3": {},
    "gemma": {"num_key_value_heads": 16, "head_dim": 256},
    "gemma3_text": {"num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096},
    "qwen2_vl_text": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2_5_vl_text": {"num_key_value_heads": 8, "sliding_window": 4096},
}
"""Per model type, what transformers takes where config.json leaves a key out."""

TEXT_TYPES = {
    "llava": "llama",
    "mistral3": "mistral",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
}
"""Per multimodal model type, that of its text where config.json does not name it."""

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_size": 4096,
        "max_position_embeddings": 2048,
    },
    "mistral": {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_size": 4096,
        "max_position_embeddings": 131_072,
    },
}
"""Per model type, what transformers takes where a ``text_config`` leaves its shape out, as LLaVA-1.5's
does."""

WINDOW_ONLY_IF_USED = (
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("qwen2_vl_text", "qwen2_5_vl_text"),
)
"""Model types whose sliding window counts only with ``use_sliding_window``, which is off by default."""

LAYER_KINDS: dict[str, Callable[[Mapping[str, Any]], Callable[[int], bool]]] = {
    "qwen2": lambda text: lambda index: index >= text.get("max_window_layers", 28),
    "qwen3": lambda text: lambda index: index >= text.get("max_window_layers", 28),
    "qwen2_moe": lambda text: (
        lambda index: index % 2 == 0 and index < text.get("max_window_layers", 28)
    ),
    "qwen2_vl_text": lambda text: lambda index: index >= text.get("max_window_layers", 80),
    "qwen2_5_vl_text": lambda text: lambda index: index >= text.get("max_window_layers", 80),
    "gemma3_text": lambda text: (
        lambda index: (index + 1) % text.get("sliding_window_pattern", 6) > 0
    ),
    "gpt_oss": lambda text: lambda index: index % 2 == 0,
}
"""Per model type, whether a layer slides where config.json does not list ``layer_types``."""

NAMES = {
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "num_key_value_heads": (
        *("n_head_kv", "num_kv_heads", "num_key_value_heads"),
        *("multi_query_group_num", "num_attention_groups"),
    ),
    "head_dim": ("head_dim", "hidden_size_per_head"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
}
"""Names under which model types keep the same figure, the first found counts."""

MOST = {"num_hidden_layers": 10_000, "num_attention_heads": 10_000, "num_key_value_heads": 10_000}
"""What lists are made of: a typing error must not take all memory. Models have at most hundreds."""

LENGTH_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
OTHER_LAYER_KEYS = (
    *("mamba_d_state", "ssm_state_size", "state_size", "attn_layer_period", "linear_attn_config"),
    *("hybrid_override_pattern", "layers_block_type", "linear_num_key_heads", "lru_width"),
)
OTHER_LAYER_TYPES = ("mamba", "linear_attention", "recurrent", "conv")
OTHER_MODEL_TYPES = ("jamba", "mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma")
ENCODER_DECODERS = ("whisper", "bart", "mbart", "t5", "mt5", "pegasus", "m2m_100", "nllb_moe")
OTHER_SENSES = ("vision_config", "audio_config", "image_token_id", "image_token_index")
BOTH_WAYS = ("bagel", "gemma3", "molmo2", "moondream3", "paligemma")
PLAIN_ROPE = ("default", "llama3", "longrope", "su", "mrope")
"""Kinds of RoPE that leave a model the positions that config.json names."""

GENERATORS = ("ForCausalLM", "ForConditionalGeneration", "ChatModel", "LMHeadModel")


class _Types(BaseModel):
    """Types of the keys that are read, wherever they stand; ``_Reader.figure`` checks its own."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    architectures: list[StrictStr] | None = None
    attention_chunk_size: StrictInt | None = None
    compression_config: dict[str, Any] | None = None
    kv_lora_rank: StrictInt | None = None
    layer_types: list[StrictStr] | None = None
    max_position_embeddings: StrictInt | None = None
    max_seq_len: StrictInt | None = None
    model_type: StrictStr | None = None
    n_positions: StrictInt | None = None
    qk_rope_head_dim: StrictInt | None = None
    quantization_config: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    seq_length: StrictInt | None = None
    sliding_window: StrictInt | None = None
    text_config: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model as its config.json describes it.

    Attributes:
        facts: what the KV cache depends on.
        model_type: config.json's word.
        dtype: of the weights, as config.json names it; None: not given.
        max_model_len: tokens that the positions are made for; None: not given, or scaled by a rule
            that needs more than a product.
        is_known: whether the model type is one of ``DEFAULTS``.
    """

    facts: ModelFacts
    model_type: str
    dtype: str | None
    max_model_len: int | None
    is_known: bool


def read_checkpoint(model: str) -> Checkpoint:
    """Read the config.json of a folder or of Hugging Face's cache.

    Args:
        model: folder, or Hugging Face id of a model that has been downloaded.

    Raises:
        ValueError: there is no such file, it is not a JSON object, or a figure is missing or bad.
    """
    file = _find(model)
    config = _json_object(file)
    _check_types(file, config)
    return _Reader(model, file, config).checkpoint()


def _json_object(file: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        ValueError: there is none in it.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON or UTF-8
        raise ValueError(
            f"{file}: expected a JSON object, got text that does not parse ({error}): correct it"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(config).__name__}: correct it")
    return config


def _check_types(file: Path, config: dict[str, Any]) -> None:
    """Refuse a file whose keys are of other types than every reader expects.

    Raises:
        ValueError: with every such key.
    """
    problems = []
    for place, part in (("", config), ("text_config.", config.get("text_config"))):
        try:
            _Types.model_validate({} if part is None else part)
        except ValidationError as error:
            problems += [
                f"{place}{'.'.join(map(str, item['loc']))}: {item['msg']}, got {item['input']!r}"
                for item in error.errors()
            ]
    if problems:
        raise ValueError(
            f"{file}: {'; '.join(problems)}: correct the file, or name the folder of a text model"
        )


def _find(model: str) -> Path:
    """The config.json of a folder, else of the snapshot in Hugging Face's cache."""
    folder = Path(os.path.expanduser(model))
    if os.path.isdir(folder):  # False for a name that no folder can have, where Path's raises
        if (folder / CONFIG_NAME).is_file():
            return folder / CONFIG_NAME
        raise ValueError(
            f"model {model!r}: expected a folder with {CONFIG_NAME}, found {folder.absolute()} "
            "without it: name the folder of a checkpoint"
        )
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        raise ValueError(
            f"model {model!r}: expected a folder (huggingface_hub, which knows downloaded models, is "
            "not installed): give the folder of a checkpoint, or pip install huggingface_hub"
        ) from None
    try:
        found = try_to_load_from_cache(model, CONFIG_NAME)
    except HFValidationError:
        found = None
    if isinstance(found, str):
        return Path(found)
    raise ValueError(
        f"model {model!r}: expected a folder with {CONFIG_NAME} or a model in Hugging Face's cache, "
        f"found neither: correct the name, or fetch the one file (hf download {model} {CONFIG_NAME})"
    )


class _Reader:
    """Reads one config.json; ``text`` is its part for text where it has several."""

    def __init__(self, model: str, file: Path, config: dict[str, Any]) -> None:
        self.model = model
        self.file = file
        self.config = config
        nested = config.get("text_config")
        self.text: Mapping[str, Any] = nested if isinstance(nested, dict) else config
        self.outer_type = str(config.get("model_type", ""))
        text_type = str(self.text.get("model_type", self.outer_type))
        self.model_type = TEXT_TYPES.get(text_type, text_type)
        shape = {} if self.text is config else SHAPES.get(self.model_type, {})
        self.known = shape | DEFAULTS.get(self.model_type, {})

    def checkpoint(self) -> Checkpoint:
        parts = (self.config, self.text)
        dtypes = [part[key] for part in parts for key in ("dtype", "torch_dtype") if part.get(key)]
        dtype = dtypes[0] if dtypes else None
        return Checkpoint(
            facts=self.facts(),
            model_type=self.model_type,
            dtype=dtype.removeprefix("torch.") if isinstance(dtype, str) else None,
            max_model_len=self.max_model_len(),
            is_known=self.model_type in DEFAULTS,
        )

    def facts(self) -> ModelFacts:
        heads = self.figure("num_attention_heads")
        layer_types = self.text.get("layer_types") or []
        attention = self.text.get("attn_config")
        architecture = (self.config.get("architectures") or ["ForCausalLM"])[0]
        caps = ("attn_logit_softcapping", "attn_logits_soft_cap")
        return ModelFacts(
            name=self.model,
            num_layers=self.figure("num_hidden_layers"),
            num_kv_heads=self.figure("num_key_value_heads", heads),
            head_size=self.head_size(heads),
            runner_type="generate" if architecture.endswith(GENERATORS) else "pooling",
            uses_mla=self.uses_mla,
            is_encoder_decoder=bool(self.config.get("is_encoder_decoder"))
            or self.model_type in ENCODER_DECODERS,
            has_other_layers=self.model_type in OTHER_MODEL_TYPES
            or any(self.text.get(key) for key in OTHER_LAYER_KEYS)
            or any(kind in OTHER_LAYER_TYPES for kind in layer_types),
            multimodal=self.multimodal,
            sees_both_ways=self.sees_both_ways,
            windows=self.windows(),
            attention_chunk_size=self.text.get("attention_chunk_size"),
            soft_caps_logits=any(self.text.get(key) for key in caps)
            or (self.model_type == "gemma2" and caps[0] not in self.text),
            uses_alibi=bool(self.text.get("alibi"))
            or architecture == "BloomForCausalLM"
            or self.text.get("position_encoding_type") == "alibi"
            or (isinstance(attention, dict) and bool(attention.get("alibi"))),
            is_not_causal="rswa_window" in self.config or "canvas_length" in self.config,
            has_noops=bool(self.text.get("block_configs")),
            own_cache=checkpoint_cache(self.quantisation()),
            shares_caches=bool(self.text.get("num_kv_shared_layers")),
        )

    def quantisation(self) -> Mapping[str, Any]:
        """How the weights are quantised; ModelOpt's older checkpoints say so in a file of its own."""
        beside = self.file.with_name(QUANTISATION_NAME)
        if self.config.get("quantization_config") is None and beside.is_file():
            return _json_object(beside)
        return find_quantisation(self.config, self.text)

    @property
    def multimodal(self) -> str | None:
        """The model type where the model takes more than text."""
        takes_more = any(key in self.config for key in OTHER_SENSES)
        return self.outer_type if takes_more or self.model_type == "whisper" else None

    @property
    def sees_both_ways(self) -> bool:
        if "is_mm_prefix_lm" in self.config:
            return bool(self.config["is_mm_prefix_lm"])
        if self.outer_type == "gemma4":
            return self.text.get("use_bidirectional_attention") == "vision"
        return self.outer_type in BOTH_WAYS

    @property
    def uses_mla(self) -> bool:
        return self.text.get("kv_lora_rank") is not None

    def head_size(self, heads: int) -> int:
        if self.uses_mla:
            return int(self.text["kv_lora_rank"]) + int(self.text.get("qk_rope_head_dim", 0))
        size = self.figure("head_dim", 0)
        return size if size else self.figure("hidden_size") // heads

    def windows(self) -> Windows | None:
        """The sliding windows by layer; a size of 0 or null means none."""
        default = self.known.get("sliding_window")
        window = self.text.get("sliding_window", default)
        if self.model_type in WINDOW_ONLY_IF_USED and not self.text.get("use_sliding_window"):
            window = None
        num_layers = self.figure("num_hidden_layers")
        return layer_windows(num_layers, window, self.layer_types(num_layers))

    def layer_types(self, num_layers: int) -> list[str] | None:
        """The kind of each layer, where config.json or its model type tells layers apart."""
        kinds: list[str] | None = self.text.get("layer_types")
        if kinds is not None or self.model_type not in LAYER_KINDS:
            return kinds
        slides = LAYER_KINDS[self.model_type](self.text)
        return [SLIDING if slides(index) else "full_attention" for index in range(num_layers)]

    def max_model_len(self) -> int | None:
        """As vLLM derives it, unless a RoPE scaling other than Llama 3's stretches it."""
        scaling = self.text.get("rope_scaling") or self.text.get("rope_parameters") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        text = self.known | dict(self.text)
        lengths: list[int] = [text[key] for key in LENGTH_NAMES if isinstance(text.get(key), int)]
        if kind not in PLAIN_ROPE or not lengths:
            return None
        return min(lengths)

    def figure(self, key: str, default: int | None = None) -> int:
        """A whole number of config.json; a null is what transformers makes of it: ``default``."""
        names = [name for name in NAMES[key] if name in self.text]
        value = self.text[names[0]] if names else self.known.get(key, default)
        value = default if value is None else value
        least = 0 if default == 0 else 1
        most = MOST.get(key, float("inf"))
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        expected = f"{' or '.join(NAMES[key])}, a whole number from 1"
        if key in MOST:
            expected += f" to {MOST[key]:,}"
        got = repr(self.text[names[0]]) if names else "no such key"
        raise ValueError(
            f"{self.file}: expected {expected}, got {got}: correct the file, or name the folder of "
            "a text model"
        )
