"""Workloads whose requests share prefixes: what is asked, in which order, how much of it can hit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

TOKENS = range(3, 600)
"""Token ids that prompts are made of; every model served here knows them."""

CHATS, TURNS = 20, 8
FIRST_TOKENS, LATER_TOKENS = (400, 1_200), (50, 300)
SYSTEM_TOKENS, USERS = 3_000, 50
SHARED_TOKENS, SHARERS = 10_000, 16
ANSWER_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request.

    Attributes:
        chat: whose history its prompt continues.
        tokens: what is new in the prompt.
        answer_tokens: tokens to generate.
    """

    chat: str
    tokens: tuple[int, ...]
    answer_tokens: int


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Requests in waves: those of a wave are sent at once, the next wave once all are answered."""

    name: str
    waves: tuple[tuple[Ask, ...], ...]

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest request, its answer included."""
        lengths: dict[str, int] = {}
        for ask in self.asks():
            grown = lengths.get(ask.chat, 0) + len(ask.tokens) + ask.answer_tokens
            lengths[ask.chat] = grown
        return max(lengths.values())

    def asks(self) -> Iterable[Ask]:
        """All requests, in order."""
        return (ask for wave in self.waves for ask in wave)

    def kept_blocks(self, block_size: int) -> int:
        """Blocks of full attention that hold all of it, every shared block once.

        Counted from the prompts alone: answers are ``answer_tokens`` tokens that nobody shares.
        One more block a request of the widest wave, for its last tokens.
        """
        blocks: set[int] = set()
        histories: dict[str, tuple[int, int]] = {}
        for ask in self.asks():
            tokens, prefix = histories.get(ask.chat, (0, 0))
            new: list[object] = [*ask.tokens, *([ask.chat] * ask.answer_tokens)]
            for token in new:
                tokens, prefix = tokens + 1, hash((prefix, token))
                if tokens % block_size == 0:
                    blocks.add(prefix)
            histories[ask.chat] = tokens, prefix
        return len(blocks) + 2 * max(map(len, self.waves))


def chats(
    seed: int, *, wave: int = 1, rounds: bool = False, count: int = CHATS, turns: int = TURNS
) -> Scenario:
    """Scenario (a): interleaved chats.

    Args:
        seed: of lengths, tokens and order.
        wave: chats that send at once.
        rounds: every chat's next turn before any chat's turn after it, the worst order for a
            least-recently-used cache; else the next chat is drawn at random.
        count: chats.
        turns: of each chat.
    """
    random = Random(f"chats {seed}")
    left = {f"chat {index}": turns for index in range(count)}
    waves = []
    while left:
        if rounds:
            most = max(left.values())
            waiting = [chat for chat, number in left.items() if number == most]
        else:
            waiting = list(left)
        asks = []
        for chat in random.sample(waiting, min(wave, len(waiting))):
            span = FIRST_TOKENS if left[chat] == turns else LATER_TOKENS
            tokens = draw(random, random.randint(*span))
            asks.append(Ask(chat=chat, tokens=tokens, answer_tokens=ANSWER_TOKENS))
            left[chat] -= 1
            if not left[chat]:
                del left[chat]
        waves.append(tuple(asks))
    name = f"{count} chats of {turns} turns, " + ("in rounds" if rounds else "interleaved")
    return Scenario(name=name + (f", {wave} at once" if wave > 1 else ""), waves=tuple(waves))


def users(
    seed: int,
    *,
    system_tokens: int = SYSTEM_TOKENS,
    count: int = USERS,
    answer_tokens: int = ANSWER_TOKENS,
) -> Scenario:
    """Scenario (b): one system prompt, users one after another."""
    random = Random(f"users {seed}")
    system = draw(random, system_tokens)
    waves = []
    for index in range(count):
        tokens = system + draw(random, random.randint(*LATER_TOKENS))
        waves.append((Ask(chat=f"user {index}", tokens=tokens, answer_tokens=answer_tokens),))
    return Scenario(name=f"{count} users of one system prompt", waves=tuple(waves))


def at_once(
    seed: int,
    *,
    shared_tokens: int = SHARED_TOKENS,
    count: int = SHARERS,
    answer_tokens: int = ANSWER_TOKENS,
) -> Scenario:
    """Scenario (c): requests that share most of their prompt and arrive at once."""
    random = Random(f"at once {seed}")
    shared = draw(random, shared_tokens)
    wave = tuple(
        Ask(
            chat=f"sharer {index}",
            tokens=shared + draw(random, random.randint(*LATER_TOKENS)),
            answer_tokens=answer_tokens,
        )
        for index in range(count)
    )
    return Scenario(name=f"{count} at once with {shared_tokens:,} shared tokens", waves=(wave,))


def joined(scenarios: Sequence[Scenario], seed: int) -> Scenario:
    """All scenarios' waves in one, interleaved at random, each in its own order."""
    random = Random(f"joined {seed}")
    order = [index for index, each in enumerate(scenarios) for _ in each.waves]
    random.shuffle(order)
    rest = [iter(each.waves) for each in scenarios]
    return Scenario(name="all of it interleaved", waves=tuple(next(rest[index]) for index in order))


def draw(random: Random, count: int) -> tuple[int, ...]:
    """``count`` token ids."""
    return tuple(random.choices(TOKENS, k=count))
