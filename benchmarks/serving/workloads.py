"""The requests of a point, made once and sent to every side.

vLLM's client reads them as its ``custom`` dataset, so that pass-key requests can be mixed into any
workload and each side gets the same bytes:

- random: prompts of random tokens;
- shared-prefix: three quarters of a prompt are shared by every four requests;
- multi-turn: conversations that grow turn by turn. vLLM's own multi-turn client is in its repository
  only, not in its package; here the assistant's earlier answers are scripted, the same for every side,
  and the turns are sent in a closed loop: all first turns, then all second ones;
- documents: questions about pieces of the user's own texts, four about each; no two pieces begin at the
  same place;
- dataset: the user's own prompts.

Every round of every point has prompts of its own: none finds them in the prefix cache from before.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from math import ceil
from pathlib import Path

from benchmarks.serving.prompts import Texts, read_documents
from benchmarks.serving.settings import TURNS, Point, Settings, Workload
from vllm_duo.evaluate.passkey import make_prompt

SHARED_SHARE = 0.75
"""Of a prompt in shared-prefix."""
PER_PREFIX = 4
"""Requests that share a prefix, or a document."""
SHARING = ("shared-prefix", "multi-turn", "documents")
"""Workloads whose prompts begin alike."""
GATE_ROUND = -1
"""In place of a round: the gate's own prompts, which no round has."""
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
        made = _rows_of_round(rows, settings, point, round_)
    else:
        made = [
            Request(prompt=prompt, output_tokens=point.output_tokens)
            for prompt in _prompts(settings, point, round_, texts, rng)
        ]
    return _mix(made, _passkeys(point, settings.passkeys(point), texts, rng))


def shared_prompts(
    settings: Settings, workload: Workload, tokens: int, texts: Texts, rng: random.Random
) -> list[str]:
    """Prompts for the gate that begin alike: of one prefix, conversation or document; else none.

    Args:
        settings: of the benchmark.
        workload: of its points.
        tokens: of each prompt, of the last turn with multi-turn.
        texts: of the model.
        rng: source of every choice.

    Raises:
        ValueError: as ``make_requests``.
    """
    if workload not in SHARING:
        return []
    point = Point(
        workload=workload,
        prompt_tokens=tokens,
        output_tokens=1,
        requests=TURNS if workload == "multi-turn" else PER_PREFIX,
        concurrency=1,
    )
    return _prompts(settings, point, GATE_ROUND, texts, rng)


def _prompts(
    settings: Settings, point: Point, round_: int, texts: Texts, rng: random.Random
) -> list[str]:
    tokens = point.prompt_tokens - texts.special_tokens
    if point.workload == "random":
        return [texts.random(tokens, rng) for _ in range(point.requests)]
    if point.workload == "shared-prefix":
        return _shared(tokens, point.requests, texts, rng)
    if point.workload == "multi-turn":
        return _turns(tokens, point.requests, texts, rng)
    corpus = [texts.encode(text) for text in read_documents(Path(settings.documents or ""))]
    first, all_pieces = _place_of_pieces(settings, point, round_)
    pieces = _pieces(corpus, tokens, range(first, first + _groups(point)), all_pieces, texts, rng)
    return [
        f"{pieces[index % len(pieces)]}\n\n"
        f"Question: {QUESTIONS[index // len(pieces) % len(QUESTIONS)]}\nAnswer:"
        for index in range(point.requests)
    ]


def _shared(tokens: int, requests: int, texts: Texts, rng: random.Random) -> list[str]:
    shared = round(tokens * SHARED_SHARE)
    prefixes = [texts.random(shared, rng) for _ in range(ceil(requests / PER_PREFIX))]
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
    conversations = ["" for _ in range(ceil(requests / TURNS))]
    prompts = []
    for index in range(requests):
        at = index % len(conversations)
        question = f"\nUser: {texts.random(said // 2, rng)}\nAssistant:"
        prompts.append(conversations[at] + question)
        conversations[at] += question + " " + texts.random(said - said // 2, rng)
    return prompts


def _groups(point: Point) -> int:
    return ceil(point.requests / PER_PREFIX)


def _place_of_pieces(settings: Settings, point: Point, round_: int) -> tuple[int, int]:
    """The number of a round's first piece among all of the run, and how many these are.

    Piece 0 is the gate's; the others follow by point and round.
    """
    first, count = 0, 1
    for other in settings.points:
        if other.workload == "documents":
            if other.key == point.key and round_ != GATE_ROUND:
                first = count + round_ * _groups(other)
            count += settings.rounds * _groups(other)
    return first, count


def _pieces(
    corpus: Sequence[Sequence[int]],
    tokens: int,
    numbers: Sequence[int],
    all_pieces: int,
    texts: Texts,
    rng: random.Random,
) -> list[str]:
    """Pieces of the texts with room for the longest question.

    Piece i begins at a token whose number in the whole corpus is i modulo ``all_pieces``, so that no
    two begin alike and none is in the prefix cache for another's sake.
    """
    room = tokens - max(len(texts.encode(f"\n\nQuestion: {q}\nAnswer:")) for q in QUESTIONS)
    least = room + all_pieces - 1
    firsts = [0, *accumulate(map(len, corpus))]
    long_enough = [
        (first, ids) for first, ids in zip(firsts, corpus, strict=False) if len(ids) >= least
    ]
    if not long_enough:
        joined = [token for ids in corpus for token in ids]
        if len(joined) < least:
            raise ValueError(
                f"documents: expected at least {least} tokens of text, for {all_pieces} pieces of "
                f"{room} tokens that begin at different places, found {len(joined)} in all files: add "
                "texts, or ask for shorter prompts (--lengths)"
            )
        long_enough = [(0, joined)]
    made = []
    for number in numbers:
        first, ids = rng.choice(long_enough)
        starts = range((number - first) % all_pieces, len(ids) - room + 1, all_pieces)
        made.append(texts.window(ids, rng.choice(starts), room))
    return made


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
    rows: Sequence[Request], settings: Settings, point: Point, round_: int
) -> list[Request]:
    first, count = 0, 0
    for other in settings.points:
        if other.workload == "dataset":
            if other.key == point.key:
                first = count + round_ * other.requests
            count += settings.rounds * other.requests
    if len(rows) < count:
        raise ValueError(
            f"dataset: expected {count} lines, one for each request of {settings.rounds} rounds of all "
            f"points, so that none finds its prompt cached, got {len(rows)}: add lines, or lower "
            "--requests or --rounds"
        )
    return list(rows[first : first + point.requests])


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
    """As the client's dataset; whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(request)) for request in requests]
    part = file.with_name(file.name + ".part")
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(file)


def read_requests(file: Path) -> list[Request]:
    """What ``write_requests`` wrote."""
    return [Request(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
