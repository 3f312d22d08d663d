"""``benchmarks.serve`` with vLLM itself: a pool that is too small, a server that dies in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import serve
from benchmarks.serving.workloads import read_requests
from tests.benchmarks.serving.runs import NEEDLE, write_documents
from vllm_duo.evaluate.passkey import first_number
from vllm_duo.report.serve_results import Run, ServeResults
from vllm_duo.report.serving import CURVES, LATENCIES, OPEN_LOOP, blocks

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[3]
REQUESTS, KEYS = 8, 2
BLOCKS = 21
"""One is vLLM's own. Three requests of 640 tokens need 21 others for their answers, with duo 24."""
FLAGS = (
    "--workloads random documents --lengths 640 --output-tokens 140 --rates 20 --concurrencies 6 "
    f"--requests {REQUESTS} --passkey-share {KEYS / REQUESTS} --rounds 1 --gate-prompts 1 "
    "--enforce-eager --env VLLM_CPU_KVCACHE_SPACE=1 --env VLLM_CPU_OMP_THREADS_BIND=nobind"
)
SERVER = f"--dtype float32 --max-model-len 1024 --num-gpu-blocks-override {BLOCKS}"


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"), 300)


@pytest.fixture(scope="module")
def died(tmp_path_factory, documents):
    """A run whose duo server was killed after the first point: (folder, exit code, what it told)."""
    base = tmp_path_factory.mktemp("loads")
    folder, log = base / "run", base / "log"
    flags = [*FLAGS.split(), "--documents", str(documents), f"--server-args={SERVER}"]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serve", str(NEEDLE), *flags, "--out", str(folder)],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        while len(list(folder.glob("runs/*/*-round0.json"))) < 2:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        kill_duo(psutil.Process(process.pid))
        code = process.wait()
    partial = ServeResults.model_validate_json((folder / "results.json").read_text())
    return folder, code, log.read_text(), partial


def kill_duo(benchmark: psutil.Process) -> None:
    (server,) = [
        child
        for child in benchmark.children()
        if "serve" in child.cmdline() and '{"duo": {"sparsity": 0.5}}' in child.cmdline()
    ]
    os.kill(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def folder(died):
    """The same run, gone on with to its end."""
    kept = {file: file.read_bytes() for file in died[0].glob("runs/*/*-round0.json")}
    assert serve.main(["--resume", str(died[0])]) == 0
    assert {file: file.read_bytes() for file in kept} == kept
    return died[0]


def runs_of(folder) -> list[Run]:
    files = sorted(folder.glob("runs/*/*-round0.json"))
    return [Run.model_validate_json(file.read_text()) for file in files]


def test_a_server_that_dies_keeps_what_is_finished(died):
    folder, code, told, partial = died
    assert code == 1
    assert "the server duo-0.5 ended with exit code -9 in the middle of the run" in told
    assert f"--resume {folder}" in told
    assert not partial.complete
    finished = [(p.key, side.side) for p in partial.points for side in p.sides]
    # Killed as the second point began; stock may have ended it.
    assert finished[:2] == [
        ("random-640-140-rate20", "stock"),
        ("random-640-140-rate20", "duo-0.5"),
    ]
    assert len(finished) <= 3


def test_the_rest_is_measured_when_it_goes_on(folder):
    results = ServeResults.model_validate_json((folder / "results.json").read_text())
    assert results.complete
    assert [(p.key, [side.side for side in p.sides]) for p in results.points] == [
        (f"{workload}-640-140-{load}", ["stock", "duo-0.5"])
        for workload in ("random", "documents")
        for load in ("rate20", "closed6")
    ]


def test_one_rate_makes_no_curve_and_two_do(folder):
    results = ServeResults.model_validate_json((folder / "results.json").read_text())
    curves = [
        CURVES.format(what=f"{workload}, 640 + 140 tokens", loop=OPEN_LOOP, latency=words)
        for workload in ("random", "documents")
        for _, words in LATENCIES
    ]
    assert not {block.title for block in blocks(results)} & set(curves)
    faster = []
    for point in results.points:
        faster.append(point)
        if point.rate is not None:
            faster.append(point.model_copy(update={"rate": 2 * point.rate}))
    titles = [block.title for block in blocks(results.model_copy(update={"points": faster}))]
    assert [title for title in titles if title in curves] == curves


def test_a_pool_that_is_too_small_preempts_and_answers_all_the_same(folder):
    for run in runs_of(folder):
        assert run.requests == REQUESTS + KEYS
        assert run.output_tokens == REQUESTS * 140 + KEYS * 12
        assert run.passkeys_right == run.passkeys_asked == KEYS
    for side in ("stock", "duo-0.5"):
        counts = [run.server for run in runs_of(folder) if run.side == side]
        # A counter, so exact. The peaks are of gauges that are sampled four times a second: a run of a
        # few seconds may hide them, down to the idle server's 0, so no bound must hold for them.
        assert sum(count.preemptions for count in counts) > 0


def test_documents_are_asked_in_the_files_own_words(folder, documents):
    texts = [file.read_text() for file in documents.iterdir()]
    files = sorted((folder / "requests").glob("documents-*"))
    assert len(files) == 2
    for file in files:
        requests = [request for request in read_requests(file) if not request.answer]
        assert len(requests) == REQUESTS
        for request in requests:
            piece, _, question = request.prompt.partition("\n\nQuestion: ")
            assert len(piece) > 1000
            assert any(piece.strip() in text for text in texts)
            assert question.endswith("?\nAnswer:")


def test_right_keys_are_those_of_the_answers_that_were_kept(folder):
    import json

    for run in runs_of(folder):
        texts = json.loads((folder / run.client_file).read_text())["generated_texts"]
        requests = read_requests(folder / run.requests_file)
        right = [
            request.answer == first_number(text)
            for request, text in zip(requests, texts, strict=True)
            if request.answer
        ]
        assert sum(right) == run.passkeys_right == len(right)
