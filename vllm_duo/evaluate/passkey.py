"""Pass-key prompts: plain English text that hides one number, and a question for it at the end.

A prompt reads: an introduction, filler sentences with the sentence that holds the pass key among
them, a question, and the start of the answer ("The pass key is"), so that a model which only
continues text answers it as well as a chat model does. Everything is drawn from the `random.Random`
that the caller passes: the same seed gives the same text.

The task is the one of Mohtashami and Jaggi, "Landmark Attention", arXiv:2305.16300.
Pure Python: no torch, no tokenizer library.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

INTRODUCTION = "Somewhere in this text is a pass key. Read the text and remember it."
KEY_PREFIX = "The pass key is"
QUESTION = "What is the pass key?"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SLOTS: dict[str, tuple[str, ...]] = {
    "name": ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack"),
    "person": _words(
        "farmer teacher doctor sailor baker painter miller hunter singer driver neighbour "
        "stranger child soldier writer gardener"
    ),
    "adjective": _words(
        "green young quiet small tall dark bright heavy broken warm cold red blue yellow "
        "clean dusty gentle hollow narrow simple strange wooden"
    ),
    "object": _words(
        "lamp book letter basket hammer bottle blanket mirror wheel candle coat drum flute "
        "map box knife rope chair table clock painting kettle ladder bag bell"
    ),
    "place": _words(
        "river garden bridge market mill station harbour church forest field tower kitchen "
        "school library castle village mountain lake barn road"
    ),
    "verb": _words(
        "carried found sold painted lost cleaned repaired wanted dropped hid borrowed bought "
        "opened moved kept watched lifted forgot noticed washed"
    ),
    "adverb": _words("slowly quickly calmly often rarely gladly sadly again"),
    "time": _words("morning evening summer winter spring night week year"),
    "weather": _words("storm rain snow wind frost fog"),
}

TEMPLATES: tuple[str, ...] = (
    "The {adjective} {person} {verb} the {object} near the {place}.",
    "In the {time} {name} {verb} the {adjective} {object}.",
    "{name} and the {person} walked to the {adjective} {place}.",
    "Every {time} the {person} waited {adverb} by the {place}.",
    "A {adjective} {object} was lying behind the {place}.",
    "After the {weather} the {place} was {adjective} and the {object} was {adjective}.",
    "Nobody at the {place} saw the {object} of the {person}.",
    "The {person} {adverb} {verb} the {object} and {verb} the {object}.",
    "The {place} was {adjective} when {name} {verb} the {object}.",
    "Then {name} told the {person} about the {adjective} {object}.",
    "During the {weather} a {person} stood {adverb} before the {place}.",
    "With the {object} from the {place} {name} went home.",
)


@dataclass(frozen=True)
class PasskeyPrompt:
    """One pass-key prompt.

    Attributes:
        text: the prompt; ends with `KEY_PREFIX`, without a trailing space.
        answer: the digits of the pass key; a right completion is `f" {answer}."`.
        depth: where the key stands among the filler sentences, 0 (first) to 1 (last), as placed.
        tokens: length of `text` as `count_tokens` counts it.
        key_tokens: positions [first, end) of the key's digits (and of the space before them, where
            the tokenizer makes that a token) among the prompt's tokens.
    """

    text: str
    answer: str
    depth: float
    tokens: int
    key_tokens: tuple[int, int]


def make_sentence(rng: random.Random) -> str:
    """One filler sentence of about ten words; it holds no digit."""
    sentence = rng.choice(TEMPLATES)
    while "{" in sentence:
        start, end = sentence.index("{"), sentence.index("}")
        sentence = (
            sentence[:start] + rng.choice(SLOTS[sentence[start + 1 : end]]) + sentence[end + 1 :]
        )
    return sentence


def make_key(rng: random.Random, digits: int = 5) -> str:
    """A pass key: `digits` decimal digits, each drawn by itself."""
    return "".join(rng.choice("0123456789") for _ in range(digits))


def vocabulary() -> list[str]:
    """Every word that a prompt can hold, as it is written there, sorted; no digits, no signs."""
    words: set[str] = set()
    texts: Sequence[str] = (INTRODUCTION, KEY_PREFIX, QUESTION, *TEMPLATES)
    for text in texts:
        words.update(word for word in text.split() if "{" not in word)
    words = {word.strip(".,?") for word in words}
    words.update(word for values in SLOTS.values() for word in values)
    return sorted(words)


def make_prompt(
    tokens: int,
    *,
    rng: random.Random,
    count_tokens: Callable[[str], int],
    depth: float | None = None,
    digits: int = 5,
) -> PasskeyPrompt:
    """Make a prompt of at most `tokens` tokens that lacks less than one sentence to `tokens`.

    Args:
        tokens: wanted length of the prompt, special tokens included.
        rng: source of every choice.
        count_tokens: tokens of a text as the server will count them, BOS included, for example
            `lambda text: len(tokenizer(text).input_ids)`. It is called about once a sentence.
        depth: where to put the key among the filler sentences, 0 to 1; None draws it.
        digits: length of the pass key.

    Raises:
        ValueError: depth outside [0, 1], digits below 1, or `tokens` too few for key and question.
    """
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must be between 0 and 1, got {depth}: 0 is the start of the text")
    if digits < 1:
        raise ValueError(f"a pass key has at least 1 digit, got digits={digits}")
    answer = make_key(rng, digits)
    wanted_depth = rng.random() if depth is None else depth
    key_sentence = f"{KEY_PREFIX} {answer}."
    fixed = count_tokens(_join([], 0, key_sentence)[0])
    if fixed > tokens:
        raise ValueError(
            f"a pass-key prompt needs at least {fixed} tokens with this tokenizer, got {tokens}: "
            "ask for a longer one"
        )
    filler = _fill(tokens - fixed, rng, count_tokens)
    while True:
        place = int(wanted_depth * len(filler) + 0.5)
        text, key_at = _join(filler, place, key_sentence)
        length = count_tokens(text)
        if length <= tokens or not filler:
            break
        filler.pop()  # tokens do not add up exactly over sentences with every tokenizer
    key_end = key_at + len(key_sentence) - 1
    span = (count_tokens(text[: key_at + len(KEY_PREFIX)]), count_tokens(text[:key_end]))
    placed = place / len(filler) if filler else wanted_depth
    return PasskeyPrompt(text, answer, placed, length, span)


def key_visible(prompt: PasskeyPrompt, *, sink_size: int, recent_size: int) -> bool:
    """Whether a streaming head still sees a part of the key where the answer begins.

    Args:
        prompt: the prompt, as long as it was made.
        sink_size: first tokens that a streaming head keeps.
        recent_size: last tokens that a streaming head keeps.
    """
    first, end = prompt.key_tokens
    last_query = prompt.tokens - 1
    return first < sink_size or end - 1 > last_query - recent_size


def is_correct(prompt: PasskeyPrompt, completion: str) -> bool:
    """Whether the first number in `completion` is the pass key (a chat reply may repeat words)."""
    return first_number(completion) == prompt.answer


def first_number(completion: str) -> str:
    """The first run of decimal digits; empty if there is none."""
    digits = ""
    for character in completion:
        if character.isdecimal():
            digits += character
        elif digits:
            break
    return digits


def _fill(budget: int, rng: random.Random, count_tokens: Callable[[str], int]) -> list[str]:
    """Filler sentences of about `budget` tokens in all: one more would not fit."""
    special = count_tokens("")
    sentences: list[str] = []
    while True:
        sentence = make_sentence(rng)
        budget -= count_tokens(" " + sentence) - special
        if budget < 0:
            return sentences
        sentences.append(sentence)


def _join(filler: list[str], place: int, key_sentence: str) -> tuple[str, int]:
    """The prompt's text, and at which character the key's sentence begins."""
    before = " ".join([INTRODUCTION, *filler[:place]]) + " "
    after = " ".join([key_sentence, *filler[place:], QUESTION, KEY_PREFIX])
    return before + after, len(before)
