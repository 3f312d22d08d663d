"""The text around the keys: templated English, or a file's sentences."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from vllm_duo.evaluate import passkey

SHORT_TEXT = 400
"""Tokens of a text below which no sensible sample can be made of it."""
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n\s*")


class Haystack(Protocol):
    """Where the text around the keys comes from."""

    def sentences(self, rng: random.Random) -> Iterator[str]:
        """Sentences without end, other ones for other states of `rng`."""
        ...


class MadeText:
    """Templated English, made as it is needed."""

    def sentences(self, rng: random.Random) -> Iterator[str]:
        """See `Haystack`."""
        while True:
            yield passkey.make_sentence(rng)


class FileText:
    """Sentences of a text file, in its order from a random one on, round its end.

    Args:
        file: UTF-8 text.
        tokenizer: counts its tokens.
        max_length: the longest sample, in tokens.

    Raises:
        ValueError: the file cannot be read, or is shorter than a sample.
    """

    def __init__(self, file: Path, tokenizer: Any, max_length: int) -> None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--text {file}: expected a readable UTF-8 text file, got {error}"
            ) from None
        self._sentences = [part for part in _SENTENCE_END.split(text.strip()) if part]
        tokens = sum(count_each(tokenizer, self._sentences)) if self._sentences else 0
        if tokens < max_length:
            lower = f" or lower --max-length to {tokens}" if tokens > SHORT_TEXT else ""
            raise ValueError(
                f"--text {file}: expected at least {max_length} tokens, one sample of the longest "
                f"length, found {tokens}: give a longer text{lower}"
            )

    def sentences(self, rng: random.Random) -> Iterator[str]:
        """See `Haystack`."""
        place = rng.randrange(len(self._sentences))
        while True:
            yield self._sentences[place % len(self._sentences)]
            place += 1


def count_each(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, without special tokens."""
    if not texts:
        return []
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]
