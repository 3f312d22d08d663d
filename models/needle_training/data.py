"""Training sequences, made as they are needed: pass-key documents and repeats of random blocks."""

import random
import re
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerFast

from vllm_duo.evaluate import passkey

PAD_KIND, TEXT_KIND, COPY_KIND, ANSWER_KIND = range(4)
COPY_SHARE = 0.3  # of the sentences of a document: copied from earlier in it
INTRODUCTION_SHARE = 0.7  # of the documents: open with the introduction
GAP_SHARE = 0.4  # of the sequences: have gaps in their position ids
PIECE = re.compile(r"\d| ?[A-Za-z]+|[^\sA-Za-z\d]|\s")


class Encoder:
    """The tokenizer for ASCII text as one dictionary look-up a word: fast enough to train on."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[str, list[int]] = {}
        self.bos: int = tokenizer.bos_token_id
        self.eos: int = tokenizer.eos_token_id
        self.size = len(tokenizer)

    def __call__(self, text: str) -> list[int]:
        """Tokens of `text`, which is ASCII, without BOS."""
        ids: list[int] = []
        for piece in PIECE.findall(text):
            if piece not in self._pieces:
                encoded = self._tokenizer(piece, add_special_tokens=False).input_ids
                self._pieces[piece] = encoded
            ids += self._pieces[piece]
        return ids

    def count(self, text: str) -> int:
        """Tokens of a prompt, BOS included."""
        return len(self(text)) + 1


@dataclass
class Sequence:
    """Tokens of one sequence, what kind of target each one is, and where its sentences begin."""

    ids: list[int]
    kinds: list[int] = field(default_factory=list)
    borders: list[int] = field(default_factory=list)

    def add(self, ids: list[int], kind: int, plain: int = 0) -> None:
        """Append `ids` as `kind`; the first `plain` of them count as text."""
        self.borders.append(len(self.ids))
        self.ids += ids
        self.kinds += [TEXT_KIND] * min(plain, len(ids)) + [kind] * (len(ids) - plain)


def make_document(length: int, rng: random.Random, encode: Encoder) -> Sequence:
    """A pass-key document with its answer, at most `length` tokens; one key, copied sentences."""
    key = passkey.make_key(rng, 5 if rng.random() < 0.7 else rng.randint(3, 8))
    ending = encode(f" {passkey.QUESTION} {passkey.KEY_PREFIX}")
    answer = [*encode(f" {key}."), encode.eos]
    budget = length - 1 - len(ending) - len(answer) - len(encode(f" {passkey.KEY_PREFIX} {key}."))
    opening = encode(passkey.INTRODUCTION)
    with_opening = length >= 128 and rng.random() < INTRODUCTION_SHARE
    budget -= len(opening) if with_opening else 0
    filler: list[tuple[str, bool]] = []
    while True:
        copied = len(filler) > 0 and rng.random() < COPY_SHARE
        text = rng.choice(filler)[0] if copied else passkey.make_sentence(rng)
        budget -= len(encode(" " + text))
        if budget < 0:
            break
        filler.append((text, copied))
    filler.insert(rng.randint(0, len(filler)), (f"{passkey.KEY_PREFIX} {key}.", False))

    document = Sequence([encode.bos], [PAD_KIND])
    if with_opening:
        document.add(opening, TEXT_KIND)
    for text, copied in filler:
        space = " " if len(document.ids) > 1 else ""
        # The first two tokens of a copied sentence do not tell yet that it is one.
        document.add(encode(space + text), COPY_KIND if copied else TEXT_KIND, 2 if copied else 0)
    document.add(ending, TEXT_KIND)
    document.add(answer, ANSWER_KIND)
    document.borders.pop()  # the answer continues the last sentence
    return document


def make_repeats(length: int, rng: random.Random, encode: Encoder) -> Sequence:
    """Blocks of random tokens, most of them repeats of earlier blocks."""
    sequence = Sequence([encode.bos], [PAD_KIND])
    blocks: list[list[int]] = []
    while (left := length - len(sequence.ids)) > 0:
        copied = len(blocks) > 0 and rng.random() < 0.8
        if copied:
            block = rng.choice(blocks)
        else:
            block = [rng.randrange(3, encode.size) for _ in range(rng.randint(6, 30))]
            blocks.append(block)
        sequence.add(block[:left], COPY_KIND if copied else PAD_KIND, min(1, left) if copied else 0)
    return sequence


def make_positions(sequence: Sequence, rng: random.Random, span: int) -> list[int]:
    """Position ids, in some sequences with 1 to 4 gaps at sentence borders, below `span`."""
    count = len(sequence.ids)
    gaps: dict[int, int] = {}
    room = span - count
    if room > 0 and rng.random() < GAP_SHARE:
        cuts = sorted(rng.randint(0, room) for _ in range(rng.randint(1, 4)))
        places = sorted(rng.choice(sequence.borders) for _ in cuts)
        gaps = dict(zip(places, cuts, strict=True))  # at each place: the sum of the gaps so far
    positions, shift = [], 0
    for index in range(count):
        shift = gaps.get(index, shift)
        positions.append(index + shift)
    return positions


@dataclass(frozen=True)
class Batch:
    """B sequences of one length T, padded at the end: ids, positions, kinds, [B, T] int64 each."""

    ids: torch.Tensor
    positions: torch.Tensor
    kinds: torch.Tensor


def make_batch(
    length: int, count: int, rng: random.Random, encode: Encoder, *, span: int, repeats: float
) -> Batch:
    """`count` sequences of at most `length` tokens; a share of `repeats` are random blocks."""
    ids = torch.zeros(count, length, dtype=torch.long)
    positions, kinds = torch.zeros_like(ids), torch.zeros_like(ids)
    for row in range(count):
        make = make_repeats if rng.random() < repeats else make_document
        sequence = make(length, rng, encode)
        size = len(sequence.ids)
        ids[row, :size] = torch.tensor(sequence.ids)
        kinds[row, :size] = torch.tensor(sequence.kinds)
        positions[row, :size] = torch.tensor(make_positions(sequence, rng, span))
    return Batch(ids, positions, kinds)
