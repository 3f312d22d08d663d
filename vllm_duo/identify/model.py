"""Loads a transformers model with its attention hooked, and refuses what cannot be hooked."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from vllm_duo.identify import memory
from vllm_duo.identify.attention import Softmax, full_attention
from vllm_duo.identify.hook import IMPLEMENTATION, AttentionHook
from vllm_duo.identify.mxfp4 import is_mxfp4, loading_arguments, unify
from vllm_duo.identify.policies import Policy
from vllm_duo.identify.refusals import (
    config_reasons,
    model_class,
    probe_reasons,
    refuse,
    text_of,
    windows_of,
)
from vllm_duo.windows import Windows, chosen_layers

PROBE_TOKENS = 24
FINGERPRINT_VALUES = 256
"""Values of each weight that the fingerprint reads, evenly spread."""


@dataclass(frozen=True)
class ModelInfo:
    """What a pattern must fit: L layers of Hq query and Hkv KV heads; D is the head size.

    `windows` are the model's own sliding windows by layer, in tokens; empty: none. `learned_sinks`:
    whether its softmax has them (see `attention`).
    """

    name: str
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    fingerprint: str
    windows: Windows = ()
    learned_sinks: bool = False

    @property
    def chosen_layers(self) -> list[int]:
        """The layers whose heads a pattern chooses: all without a sliding window of the model's own."""
        chosen = chosen_layers(self.windows)
        return list(range(self.num_layers)) if chosen is None else chosen

    @property
    def largest_window(self) -> int:
        """Tokens of the model's own largest sliding window; 0: none."""
        return max(filter(None, self.windows), default=0)


@dataclass(frozen=True, eq=False)
class HookedModel:
    """A causal language model whose attention layers compute what a `Policy` says.

    Attributes:
        model: the transformers model, in evaluation mode, weights frozen; a multimodal one is asked in
            text alone, and only its decoder is hooked.
        tokenizer: its fast tokenizer.
        hook: stands in for its attention.
        info: its shape and fingerprint.
        device: where it lies.
    """

    model: Any
    tokenizer: Any
    hook: AttentionHook
    info: ModelInfo
    device: torch.device

    def hidden(self, ids: Tensor, policy: Policy) -> Tensor:
        """Last hidden states, after the final norm: ids [B, T] int64 -> [B, T, hidden].

        A backward pass through them needs the policy in place too: see `AttentionHook.using`.
        """
        with self.hook.using(policy):
            output = self.model.base_model(input_ids=ids.to(self.device), use_cache=False)
        states: Tensor = output.last_hidden_state
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token before any final scaling or cap: [..., hidden] -> [..., vocab]."""
        scores: Tensor = self.model.get_output_embeddings()(hidden)
        return scores

    def checkpoint_layers(self) -> None:
        """Keep only the layers' inputs for the backward pass; each layer is computed again in it.

        Layers count as training for this; what lies inside them does not, so dropout stays off.

        Raises:
            NotImplementedError: the architecture cannot.
        """
        try:
            self.model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        except ValueError as error:
            raise NotImplementedError(
                f"{self.info.architecture}: method gates needs activation checkpointing by layer, "
                f"which this model lacks ({error}): use a forward-only method"
            ) from None
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True


def load_model(name: str, *, device: str | None, dtype: str | None) -> HookedModel:
    """Load a checkpoint for identification.

    Args:
        name: folder or Hugging Face name.
        device: torch device; None takes cuda where there is one, else the CPU.
        dtype: name of a torch dtype; None is bfloat16 on a GPU, else float32.

    Raises:
        ValueError: no such model or device, or a tokenizer without character offsets.
        NotImplementedError: the model's attention cannot be hooked; every reason is listed.
        MemoryError: its weights do not fit.
    """
    target = choose_device(device)
    number = getattr(torch, dtype or ("bfloat16" if target.type == "cuda" else "float32"))
    config = _load_config(name)
    refuse(name, config, list(config_reasons(config)))
    tokenizer = _load_tokenizer(name)
    memory.check_weights_fit(name, config, number)
    try:
        model = model_class(config).from_pretrained(
            name, dtype=number, attn_implementation="eager", **loading_arguments(config)
        )
        if is_mxfp4(config):
            unify(model, number)
        model = model.to(target).eval().requires_grad_(False)
        return hook_model(model, tokenizer, name, target)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        raise memory.explain_while_loading(name) from None


def hook_model(model: Any, tokenizer: Any, name: str, device: torch.device) -> HookedModel:
    """Hook a loaded model and hold it against its own attention on a short text.

    Raises:
        NotImplementedError: it has no attention layers, or they compute something else.
    """
    seen: dict[int, tuple[int, int, int]] = {}
    with_sinks: list[int] = []

    def look(layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
        seen[layer] = (query.shape[1], key.shape[1], key.shape[3])
        with_sinks.extend([layer] * (softmax.sinks is not None))
        return full_attention(query, key, value, softmax)

    text = text_of(model.config)
    windows = windows_of(text)
    if windows is None:
        raise AssertionError("config_reasons refuses such a model")
    architecture = type(model).__name__
    ids = (torch.arange(2 * PROBE_TOKENS) * 7 + 3).view(2, -1) % text.vocab_size
    ids = ids.to(device)
    with torch.no_grad():
        expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
        multimodal = text is not model.config
        model.set_attn_implementation(
            {"text_config": IMPLEMENTATION} if multimodal else IMPLEMENTATION
        )
        hook = AttentionHook(look, windows)
        hook.install(model)
        found = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.float()
    refuse(name, model.config, probe_reasons(seen, expected, found, next(model.parameters())))
    num_heads, num_kv_heads, head_size = next(iter(seen.values()))
    info = ModelInfo(
        name=name,
        architecture=architecture,
        num_layers=len(hook.layers),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        max_positions=int(getattr(text, "max_position_embeddings", 0) or 2**31),
        fingerprint=fingerprint(model),
        windows=windows,
        learned_sinks=bool(with_sinks),
    )
    return HookedModel(model, tokenizer, hook, info, device)


def choose_device(device: str | None) -> torch.device:
    """The device of that name, else the first GPU, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {device}: expected a torch device of this machine, got "
            f"{str(error).splitlines()[0]}: use cpu"
        ) from None
    return target


def fingerprint(model: nn.Module) -> str:
    """16 hex digits that tell checkpoints apart: names, shapes, dtypes and a sample of all weights.

    `FINGERPRINT_VALUES` evenly spread values of each weight are read, not all, so that it takes
    seconds for a model of any size.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(json.dumps([name, list(weight.shape), str(weight.dtype)]).encode())
        flat = weight.detach().flatten()
        step = max(1, flat.numel() // FINGERPRINT_VALUES)
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _load_config(name: str) -> Any:
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise ValueError(
            f"model {name}: expected a folder with config.json and weights in transformers' "
            "format, found no config.json: give the checkpoint's folder"
        )
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model {name!r}: expected a local folder or a model of the Hugging Face hub that this "
            f"transformers knows, found none ({_first_line(error)}): correct the name"
        ) from None


def _load_tokenizer(name: str) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model {name}: expected a tokenizer beside the weights, found none "
            f"({_first_line(error)}): add tokenizer.json and tokenizer_config.json"
        ) from None
    if not tokenizer.is_fast:
        raise ValueError(
            f"model {name}: expected a fast tokenizer (tokenizer.json), got "
            f"{type(tokenizer).__name__}, which cannot say where a token stands in the text: "
            "convert it with transformers"
        )
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
