"""Pass-key samples: keys hidden in a haystack, asked for at the end, the answer appended.

With one key the text is that of `vllm_duo.evaluate.passkey`. With several ("The second pass key is
...") all are asked for in order, as DuoAttention does (arXiv:2410.10819, section 2.2). Left open
there and chosen here: plain text without a chat template; keys at places drawn evenly over the whole
haystack; lengths drawn evenly between the shortest and the longest.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from vllm_duo.evaluate import passkey
from vllm_duo.identify.haystack import Haystack, count_each

ORDINALS = (
    *(
        "first",
        "second",
        "third",
        "fourth",
        "fifth",
        "sixth",
        "seventh",
        "eighth",
        "ninth",
        "tenth",
    ),
    *("eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth"),
    *("eighteenth", "nineteenth", "twentieth"),
)
SENTENCES_AT_ONCE = 64


@dataclass(frozen=True)
class Sample:
    """Tokens of one sample and where its keys and answers stand.

    Attributes:
        ids: token ids, answer included.
        answers: [first, end) of each answer's tokens: key and full stop.
        keys: [first, end) of the key's tokens within each answer.
        needles: [first, end) of each sentence of the haystack that holds a key.
        needle_keys: [first, end) of each key's tokens in the haystack.
    """

    ids: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]
    needles: tuple[tuple[int, int], ...]
    needle_keys: tuple[tuple[int, int], ...]

    def answer_queries(self) -> list[int]:
        """Positions where the tokens of the answers are predicted."""
        return [p - 1 for first, end in self.answers for p in range(first, end)]

    def key_queries(self) -> list[int]:
        """Positions where the tokens of the keys are predicted."""
        return [p - 1 for first, end in self.keys for p in range(first, end)]

    def hidden(self, sink_size: int, recent_size: int) -> bool:
        """Whether no streaming head sees any part of a key where its answer begins."""
        return all(
            first >= sink_size and end - 1 <= asked - 1 - recent_size
            for (first, end), (asked, _) in zip(self.needle_keys, self.keys, strict=True)
        )


@dataclass(frozen=True)
class SampleMaker:
    """Makes samples; a sample depends on the seed, its purpose and its number alone.

    Attributes:
        tokenizer: fast tokenizer of the model.
        haystack: text around the keys.
        seed: of every sample.
        lengths: tokens of the shortest and of the longest sample, answer included.
        keys: keys in a sample.
        key_style: "digits" or "words".
        key_length: digits or words of a key.
    """

    tokenizer: Any
    haystack: Haystack
    seed: int
    lengths: tuple[int, int]
    keys: int = 1
    key_style: str = "digits"
    key_length: int = 5

    @cached_property
    def words(self) -> list[str]:
        """Words that are one token of this tokenizer, sorted.

        Raises:
            ValueError: there are too few.
        """
        tokens = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        texts = {self.tokenizer.convert_tokens_to_string([token]) for token in tokens if token}
        words = sorted({text.strip() for text in texts if re.fullmatch(r" ?[a-z]{3,}", text)})
        if len(words) < 50:
            raise ValueError(
                f"key_style words: expected a tokenizer with at least 50 whole words, found "
                f"{len(words)}: use key_style digits"
            )
        return words

    def make(self, purpose: str, index: int) -> Sample:
        """Sample `index` of those made for `purpose`.

        Raises:
            ValueError: keys and questions alone are longer than the sample may be.
        """
        rng = random.Random(f"{self.seed} {purpose} {index}")
        length = rng.randint(*self.lengths)
        keys = [self._make_key(rng) for _ in range(self.keys)]
        prefixes = key_prefixes(self.keys)
        questions = passkey.QUESTION if self.keys == 1 else "What are the pass keys?"
        needles = [f"{prefix} {key}." for prefix, key in zip(prefixes, keys, strict=True)]
        fixed = [passkey.INTRODUCTION, *needles, questions, *needles]
        budget = length - self._count(" ".join(fixed))
        if budget < 0:
            raise ValueError(
                f"{self.keys} pass key(s) with their questions take {length - budget} tokens with "
                f"this tokenizer, the sample has {length}: raise the lengths or lower --keys"
            )
        filler = self._fill(budget, rng)
        places = sorted(rng.random() for _ in needles)
        while True:
            sample = self._assemble(filler, places, needles, questions, prefixes, keys)
            if len(sample.ids) <= length or not filler:
                return sample
            filler.pop()  # tokens do not add up exactly over sentences with every tokenizer

    def make_hidden(
        self, purpose: str, count: int, sink_size: int, recent_size: int
    ) -> list[Sample]:
        """The first `count` samples whose keys lie outside of what a streaming head keeps.

        Raises:
            ValueError: hardly any sample hides its keys.
        """
        found: list[Sample] = []
        for index in range(20 * count + 100):
            if len(found) == count:
                return found
            sample = self.make(purpose, index)
            if sample.hidden(sink_size, recent_size):
                found.append(sample)
        raise ValueError(
            f"of {20 * count + 100} samples of {self.lengths[1]} tokens only {len(found)} hide "
            f"their keys from {sink_size} sink and {recent_size} recent tokens: raise the lengths"
        )

    def _make_key(self, rng: random.Random) -> str:
        if self.key_style == "words":
            return " ".join(rng.choice(self.words) for _ in range(self.key_length))
        return passkey.make_key(rng, self.key_length)

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text).input_ids)

    def _fill(self, budget: int, rng: random.Random) -> list[str]:
        filler: list[str] = []
        source = self.haystack.sentences(rng)
        while True:
            batch = list(islice(source, SENTENCES_AT_ONCE))
            counts = count_each(self.tokenizer, [" " + sentence for sentence in batch])
            for sentence, tokens in zip(batch, counts, strict=True):
                budget -= tokens
                if budget < 0:
                    return filler
                filler.append(sentence)

    def _assemble(
        self,
        filler: Sequence[str],
        places: Sequence[float],
        needles: Sequence[str],
        question: str,
        prefixes: Sequence[str],
        keys: Sequence[str],
    ) -> Sample:
        parts, spans = [passkey.INTRODUCTION], {}
        at = len(passkey.INTRODUCTION)
        pending = [(int(place * (len(filler) + 1)), n) for n, place in enumerate(places)]
        for index in range(len(filler) + 1):
            while pending and pending[0][0] == index:
                number = pending.pop(0)[1]
                spans["needle", number] = at + 1
                parts.append(needles[number])
                at += 1 + len(needles[number])
            if index < len(filler):
                parts.append(filler[index])
                at += 1 + len(filler[index])
        parts.append(question)
        at += 1 + len(question)
        for number, needle in enumerate(needles):
            spans["answer", number] = at + 1
            parts.append(needle)
            at += 1 + len(needle)
        encoded = self.tokenizer(" ".join(parts), return_offsets_mapping=True)
        offsets = encoded.offset_mapping

        def find(kind: str, number: int, start: int, end: int) -> tuple[int, int]:
            base = spans[kind, number]
            return _tokens_of(offsets, base + start, base + end)

        heads = [len(prefix) + 1 for prefix in prefixes]
        tails = [head + len(key) for head, key in zip(heads, keys, strict=True)]
        numbers = range(len(needles))
        return Sample(
            ids=tuple(encoded.input_ids),
            answers=tuple(find("answer", n, heads[n], tails[n] + 1) for n in numbers),
            keys=tuple(find("answer", n, heads[n], tails[n]) for n in numbers),
            needles=tuple(find("needle", n, 0, tails[n] + 1) for n in numbers),
            needle_keys=tuple(find("needle", n, heads[n], tails[n]) for n in numbers),
        )


def key_prefixes(keys: int) -> list[str]:
    """How each key's sentence begins: "The pass key is", or "The first pass key is" and so on."""
    if keys == 1:
        return [passkey.KEY_PREFIX]
    return [f"The {ordinal} pass key is" for ordinal in ORDINALS[:keys]]


def to_batch(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Samples padded at their end: [B, T] int64 ids, [B, T] bool where answer tokens are predicted."""
    length = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), length, dtype=torch.long)
    answers = torch.zeros(len(samples), length, dtype=torch.bool)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        answers[row, sample.answer_queries()] = True
    return ids, answers


def _tokens_of(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    """[first, end) of the tokens that hold a character of [start, end)."""
    inside = [index for index, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    return inside[0], inside[-1] + 1
