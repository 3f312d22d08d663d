"""Mixed requests over HTTP in a pool that forces preemption: nothing wrong, lost, stuck or grown.

The suite asks ``DEFAULT_REQUESTS``; ``make soak`` asks 2,000.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from dataclasses import dataclass, field

import psutil
import pytest

from tests.e2e.needle import MODEL, client_of, serve
from tests.e2e.soak import Report, ask_all, make_questions
from tests.e2e.test_served_requests import assert_all_blocks_return
from vllm_duo.evaluate.passkey import is_correct

pytestmark = [pytest.mark.engine, pytest.mark.timeout(5400)]

DEFAULT_REQUESTS = 300
REQUESTS = int(os.environ.get("VLLM_DUO_SOAK_REQUESTS", DEFAULT_REQUESTS))
CONCURRENCY = 32
SEED = 20_261_125
WARM_UP = 100
"""Requests of the warm-up: a heavy and a light wave."""

# A block holds 16 tokens. The longest request of the mix holds 126 + 5 blocks and a heavy wave's
# usual one some 100, so about six of 32 run at once; a light wave's hold 5 to 75 and mostly all run.
POOL_BLOCKS = 700
FLAGS = [
    *("--attention-backend", "duo", "--block-size", "16", "--max-model-len", "2304"),
    *("--max-num-seqs", "32", "--max-num-batched-tokens", "512"),
    *("--num-gpu-blocks-override", str(POOL_BLOCKS)),
]

MAX_GROWTH_MIB = 64
"""Growth of a process's resident memory that passes. A leak of one request's blocks, tokens or hashes
is some 10 KiB, 20 MiB in 2,000 requests, but so much also comes and goes with malloc's arenas."""


@dataclass
class Soak:
    """One run.

    Attributes:
        report: what the clients saw.
        metrics: vLLM's counters at the end, less those of the warm-up.
        rss_mib: resident memory by process, after the warm-up and at the end.
        seconds: of the load after the warm-up.
        log: the server's.
    """

    report: Report
    metrics: dict[str, float]
    rss_mib: dict[str, tuple[float, float]]
    seconds: float
    log: str = field(repr=False)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("soak") / "log", *FLAGS) as server:
        server.wait_until_ready()
        yield server


@pytest.fixture(scope="module")
def soak(served):
    questions = make_questions(WARM_UP + REQUESTS, SEED)
    asyncio.run(ask_all(served.url, questions[:WARM_UP], CONCURRENCY))
    assert_all_blocks_return(served, client_of(served))
    rss, before = rss_mib(served), counters(served)
    start = time.monotonic()
    report = asyncio.run(ask_all(served.url, questions[WARM_UP:], CONCURRENCY))
    seconds = time.monotonic() - start
    assert_all_blocks_return(served, client_of(served))
    after, last = rss_mib(served), counters(served)
    result = Soak(
        report,
        {name: last[name] - before.get(name, 0) for name in last},
        {name: (rss[name], after[name]) for name in rss},
        seconds,
        served.log.read_text(errors="replace"),
    )
    sys.stdout.write(f"\n{result}\n")  # `make soak` shows it
    return result


def counters(server):
    """vLLM's counters under short names, over all labels but the reason why a request ended."""
    found = {}
    for key, value in server.metrics("vllm:").items():
        name = key.split("{")[0].removeprefix("vllm:").removesuffix("_total")
        if name == "request_success":
            name = key.split("finished_reason=")[1].split(",")[0].rstrip("}")
        found[name] = found.get(name, 0) + value
    return found


def rss_mib(server):
    """Resident memory of the API server, the engine core and the worker."""
    main = psutil.Process(server.process.pid)
    sizes = {}
    for process in [main, *main.children(recursive=True)]:
        name = " ".join(process.cmdline()).split("::")[-1].split()[0]
        if process == main or name in ("EngineCore", "Worker"):
            size = process.memory_info().rss / 2**20
            sizes["API server" if process == main else name] = size
    return sizes


def test_every_request_came_to_an_end(soak):
    assert soak.report.kinds.total() == REQUESTS
    assert soak.report.right + len(soak.report.wrong) + soak.report.gone == REQUESTS
    # Every kind in numbers; a client that wanted to go may be answered before.
    assert min(soak.report.kinds.values()) >= REQUESTS / 50
    assert len(soak.report.kinds) == 7
    assert soak.report.gone >= REQUESTS / 10


def test_every_answer_is_right_that_full_memory_gets_right(soak):
    from transformers import AutoTokenizer

    from tests.oracle import Oracle

    tokenizer = AutoTokenizer.from_pretrained(str(MODEL))
    full = Oracle(MODEL, [[True] * 4] * 4, 0, 1)

    def full_memory_answer(text):
        tokens = tokenizer(text).input_ids
        start = len(tokens)
        for _ in range(12):
            tokens.append(int(full.logprobs(tokens)[-1].argmax()))
        return tokenizer.decode(tokens[start:])

    unexcused = [
        (question.kind, answers, question.prompt.answer)
        for question, answers in soak.report.wrong
        if is_correct(question.prompt, full_memory_answer(question.prompt.text))
    ]
    assert unexcused == []


def test_the_pool_was_too_small(soak):
    assert soak.metrics["num_preemptions"] >= REQUESTS / 50


def test_clients_that_went_were_noticed(soak):
    assert soak.metrics["abort"] >= soak.report.gone / 2


def test_prefixes_were_hit(soak):
    assert soak.metrics["prefix_cache_hits"] > 0


def test_no_process_grew(soak):
    assert soak.rss_mib.keys() == {"API server", "EngineCore", "Worker"}
    grown = {name: after - before for name, (before, after) in soak.rss_mib.items()}
    assert max(grown.values()) <= MAX_GROWTH_MIB, grown


def test_the_server_logged_no_error(soak):
    assert "ERROR" not in soak.log
    assert "Traceback" not in soak.log
