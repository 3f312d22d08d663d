"""Prompts of a given length in the served model's tokens; the same random source gives the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_duo.evaluate.tokenizer import open_tokenizer

TEXT_SUFFIXES = (".txt", ".md", ".rst")
REPAIRS = 50


@dataclass(frozen=True)
class Texts:
    """Makes and measures texts with a model's tokenizer.

    Attributes:
        model: folder or Hugging Face id of the served model.
    """

    model: str

    @cached_property
    def _tokenizer(self) -> Any:
        return open_tokenizer(self.model)

    @cached_property
    def special_tokens(self) -> int:
        """Tokens that the server adds to every prompt."""
        return self.count("")

    def count(self, text: str) -> int:
        """Tokens of a prompt as the server counts them, special ones included."""
        return len(self._tokenizer.encode(text).ids)

    def encode(self, text: str) -> list[int]:
        """Tokens without special ones."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Their text."""
        return str(self._tokenizer.decode(list(tokens)))

    def random(self, tokens: int, rng: random.Random) -> str:
        """A text of so many random tokens, special ones not counted.

        Raises:
            ValueError: ``tokens`` is below 1.
            RuntimeError: this tokenizer turns no text into exactly so many tokens.
        """
        if tokens < 1:
            raise ValueError(f"a prompt has at least 1 token besides special ones, got {tokens}")
        ids = [self._random_token(rng) for _ in range(tokens)]
        for _ in range(REPAIRS):
            # Neighbours may merge, or split, once they are text: cut, or fill up, and look again.
            text = self.decode(ids)
            ids = self.encode(text)
            if len(ids) == tokens:
                return text
            ids = ids[:tokens] + [self._random_token(rng) for _ in range(tokens - len(ids))]
        raise RuntimeError(
            f"no random text of exactly {tokens} tokens came out of the tokenizer of {self.model} "
            f"in {REPAIRS} tries: use another length, or the workload dataset"
        )

    def _random_token(self, rng: random.Random) -> int:
        """One that survives being text by itself: no special token, no half of a character."""
        while True:
            token = rng.randrange(self._tokenizer.get_vocab_size())
            if self.encode(self.decode([token])) == [token]:
                return token

    def window(self, ids: Sequence[int], start: int, tokens: int) -> str:
        """The piece of ``ids`` from ``start`` on, of at most so many tokens."""
        size = tokens
        while True:
            text = self.decode(ids[start : start + size])
            over = len(self.encode(text)) - tokens
            if over <= 0:
                return text
            size -= over


def read_documents(folder: Path) -> list[str]:
    """The texts of a folder, by name; its sub-folders are searched too.

    Raises:
        ValueError: no such folder, no text in it, or a file that is not UTF-8.
    """
    if not folder.is_dir():
        raise ValueError(f"--documents {folder}: expected a folder, found none: correct the path")
    files = sorted(file for file in folder.rglob("*") if file.suffix in TEXT_SUFFIXES)
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file}: expected UTF-8 text, got other bytes ({error}): convert or remove it"
            ) from None
    if not any(text.strip() for text in texts):
        raise ValueError(
            f"--documents {folder}: expected text in files named *{', *'.join(TEXT_SUFFIXES)}, found "
            f"{len(files)} such files and no text: name another folder"
        )
    return texts
