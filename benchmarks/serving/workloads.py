"""The requests of a point, made once and sent to every side.

vLLM's client reads them as its ``custom`` dataset, so that pass-key requests can be mixed into any
workload and each side gets the same bytes:

- random: prompts of random tokens;
- shared-prefix: three quarters of a prompt are shared by every four requests;
- multi-turn: conversations that grow turn by turn. vLLM's own multi-turn client is in its repository
  only, not in its package; here the assistant's earlier answers are scripted, the same for every side,
  and the turns are sent in a closed loop: all first turns, then all second ones;
- documents: questions about pieces of the user's own texts, four about each;
- dataset: the user's own prompts.

Every round has prompts of its own: none finds its prompt in the prefix cache from a round before.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.serving.prompts import Texts, read_documents
from benchmarks.serving.settings import Point, Settings
from vllm_duo.evaluate.passkey import make_prompt

SHARED_SHARE = 0.75
"""Of a prompt in shared-prefix."""
PER_PREFIX = 4
"""Requests that share a prefix, or a document."""
TURNS = 4
PASSKEY_OUTPUT_TOKENS = 12
DATASET_PASSKEY_TOKENS = 512
"""Length of pass-key prompts beside the user's own, whose lengths differ."""
QUESTIONS = (
    "What is this text about?",
    "Who is mentioned in it, and why?",
    "Which numbers does it give?",
    "What follows from it?",
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One line of the client's dataset.

    Attributes:
        prompt: text.
        output_tokens: to generate.
        answer: the pass key; empty for other requests.
    """

    prompt: str
    output_tokens: int
    answer: str = ""


def make_requests(settings: Settings, point: Point, round_: int, texts: Texts) -> list[Request]:
    """The requests of one round of a point, pass-key requests spread over them.

    Raises:
        ValueError: the documents or the dataset do not hold as much, or a prompt is too short for
            what it must hold.
    """
    rng = random.Random(f"{settings.seed} {point.key} {round_}")
    if point.workload == "dataset":
        rows = read_dataset(Path(settings.dataset or ""), point.output_tokens)
        made = _rows_of_round(rows, point.requests, round_, settings.rounds)
    else:
        made = [
            Request(prompt=prompt, output_tokens=point.output_tokens)
            for prompt in _prompts(settings, point, texts, rng)
        ]
    return _mix(made, _passkeys(point, settings.passkeys(point), texts, rng))


def _prompts(settings: Settings, point: Point, texts: Texts, rng: random.Random) -> list[str]:
    tokens = point.prompt_tokens - texts.special_tokens
    if point.workload == "random":
        return [texts.random(tokens, rng) for _ in range(point.requests)]
    if point.workload == "shared-prefix":
        return _shared(tokens, point.requests, texts, rng)
    if point.workload == "multi-turn":
        return _turns(tokens, point.requests, texts, rng)
    corpus = [texts.encode(text) for text in read_documents(Path(settings.documents or ""))]
    return _about_documents(corpus, tokens, point.requests, texts, rng)


def _shared(tokens: int, requests: int, texts: Texts, rng: random.Random) -> list[str]:
    shared = round(tokens * SHARED_SHARE)
    prefixes = [texts.random(shared, rng) for _ in range(-(-requests // PER_PREFIX))]
    # A line's end keeps the two parts' tokens apart with most tokenizers; it may add tokens.
    own = tokens - shared - len(texts.encode("\n"))
    return [
        prefixes[index % len(prefixes)] + "\n" + texts.random(own, rng) for index in range(requests)
    ]


def _turns(tokens: int, requests: int, texts: Texts, rng: random.Random) -> list[str]:
    frame = len(texts.encode("\nUser: \nAssistant: "))
    said = tokens // TURNS - frame
    if said < 2:
        raise ValueError(
            f"multi-turn: expected prompts of at least {TURNS * (frame + 2)} tokens for {TURNS} turns "
            f"with this tokenizer, got {tokens}: ask for longer ones (--lengths)"
        )
    conversations = ["" for _ in range(-(-requests // TURNS))]
    prompts = []
    for index in range(requests):
        at = index % len(conversations)
        question = f"\nUser: {texts.random(said // 2, rng)}\nAssistant:"
        prompts.append(conversations[at] + question)
        conversations[at] += question + " " + texts.random(said - said // 2, rng)
    return prompts


def _about_documents(
    corpus: Sequence[Sequence[int]], tokens: int, requests: int, texts: Texts, rng: random.Random
) -> list[str]:
    room = tokens - max(len(texts.encode(f"\n\nQuestion: {q}\nAnswer:")) for q in QUESTIONS)
    long_enough = [ids for ids in corpus if len(ids) >= room]
    if not long_enough:
        joined = [token for ids in corpus for token in ids]
        if len(joined) < room:
            raise ValueError(
                f"documents: expected at least {room} tokens of text, found {len(joined)} in all "
                "files: add texts, or ask for shorter prompts (--lengths)"
            )
        long_enough = [joined]
    pieces = [
        texts.window(rng.choice(long_enough), room, rng) for _ in range(-(-requests // PER_PREFIX))
    ]
    return [
        f"{pieces[index % len(pieces)]}\n\n"
        f"Question: {QUESTIONS[index // len(pieces) % len(QUESTIONS)]}\nAnswer:"
        for index in range(requests)
    ]


def _passkeys(point: Point, count: int, texts: Texts, rng: random.Random) -> list[Request]:
    tokens = point.prompt_tokens or DATASET_PASSKEY_TOKENS
    made = [make_prompt(tokens, rng=rng, count_tokens=texts.count) for _ in range(count)]
    return [
        Request(prompt=prompt.text, output_tokens=PASSKEY_OUTPUT_TOKENS, answer=prompt.answer)
        for prompt in made
    ]


def _mix(requests: Sequence[Request], passkeys: Sequence[Request]) -> list[Request]:
    """Spread the pass keys evenly; the order of the others stays."""
    places = {
        (index + 1) * len(requests) // (len(passkeys) + 1) + index: passkey
        for index, passkey in enumerate(passkeys)
    }
    others = iter(requests)
    total = len(requests) + len(passkeys)
    return [places[at] if at in places else next(others) for at in range(total)]


def _rows_of_round(
    rows: Sequence[Request], requests: int, round_: int, rounds: int
) -> list[Request]:
    if len(rows) < requests * rounds:
        raise ValueError(
            f"dataset: expected {requests} requests x {rounds} rounds = {requests * rounds} lines, so "
            f"that no round finds its prompts cached, got {len(rows)}: add lines, or lower --requests "
            "or --rounds"
        )
    return list(rows[round_ * requests : (round_ + 1) * requests])


def read_dataset(file: Path, output_tokens: int) -> list[Request]:
    """The user's prompts: one JSON object a line with "prompt" and, if wanted, "output_tokens".

    Raises:
        ValueError: no such file, nothing in it, or broken lines: all of them are named.
    """
    if not file.is_file():
        raise ValueError(f"--dataset {file}: expected a JSONL file, found none: correct the path")
    rows, broken = [], []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                rows.append(_row(line, output_tokens))
            except ValueError as error:
                broken.append(f"line {number}: {error}")
    if broken:
        told = "\n  ".join(broken[:10])
        more = f"\n  and {len(broken) - 10} more" if len(broken) > 10 else ""
        raise ValueError(
            f'--dataset {file}: expected one JSON object a line, {{"prompt": "...", "output_tokens": '
            f"32}}, got {len(broken)} broken lines: correct or remove them\n  {told}{more}"
        )
    if not rows:
        raise ValueError(f"--dataset {file}: expected prompts, found an empty file: fill it")
    return rows


def _row(line: bytes, output_tokens: int) -> Request:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"an object was expected, got {type(row).__name__}")
    prompt, wanted = row.get("prompt"), row.get("output_tokens", output_tokens)
    if not isinstance(prompt, str) or not prompt:
        raise ValueError('"prompt" must be a text that is not empty')
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise ValueError(f'"output_tokens" must be a whole number above 0, got {wanted!r}')
    return Request(prompt=prompt, output_tokens=wanted)


def write_requests(requests: Sequence[Request], file: Path) -> None:
    """As the client's dataset."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(request)) for request in requests]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
