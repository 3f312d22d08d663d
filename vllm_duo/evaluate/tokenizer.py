"""Counts tokens as the served model does, without torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm_duo.evaluate.prompts import CountTokens

TOKENIZER_NAME = "tokenizer.json"


def load_tokenizer(model: str) -> tuple[CountTokens, int]:
    """A function that counts tokens, special ones included, and the size of the vocabulary.

    Args:
        model: folder, or Hugging Face id of a model in the local cache.

    Raises:
        ValueError: the model has no tokenizer.json there.
    """
    tokenizer = open_tokenizer(model)
    return lambda text: len(tokenizer.encode(text).ids), int(tokenizer.get_vocab_size())


def open_tokenizer(model: str) -> Any:
    """The model's ``tokenizers.Tokenizer``.

    Args:
        model: folder, or Hugging Face id of a model in the local cache.

    Raises:
        ValueError: the model has no tokenizer.json there.
    """
    from tokenizers import Tokenizer

    file = Path(os.path.expanduser(model)) / TOKENIZER_NAME
    if not os.path.isfile(file):
        file = _cached(model)
    return Tokenizer.from_file(str(file))


def _cached(model: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, TOKENIZER_NAME)
    except HFValidationError:
        found = None
    if not isinstance(found, str):
        raise ValueError(
            f"model {model!r}: expected a folder, or a model in Hugging Face's cache, with "
            f"{TOKENIZER_NAME}, found none: name a model with a fast tokenizer"
        )
    return Path(found)
