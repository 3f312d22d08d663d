"""``benchmarks.serve`` with vLLM itself: conversations, and questions about local files."""

from __future__ import annotations

from itertools import takewhile

import pytest

from benchmarks import serve
from benchmarks.serving.prompts import Texts
from benchmarks.serving.workloads import read_requests
from tests.benchmarks.serving.runs import NEEDLE, results_of, write_documents
from vllm_duo.report.load import load_results
from vllm_duo.report.render import render
from vllm_duo.report.serve_results import Run

pytestmark = [pytest.mark.engine, pytest.mark.slow]

BLOCK = 128  # vLLM's on CPUs: hits come in whole blocks
TURN_REQUESTS, IN_FLIGHT, PASSKEYS = 8, 2, 2
MULTI_TURN, DOCUMENTS = "multi-turn", "documents"


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("documents"), 250)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, documents):
    """One run of both workloads: its three servers are started once."""
    folder = tmp_path_factory.mktemp("shared") / "run"
    flags = [
        *("--workloads", MULTI_TURN, DOCUMENTS, "--documents", str(documents)),
        *("--lengths", "1024", "--output-tokens", "8", "--rounds", "2"),
        *("--requests", str(TURN_REQUESTS), "--concurrencies", str(IN_FLIGHT)),
        *("--passkey-share", str(PASSKEYS / TURN_REQUESTS), "--enforce-eager"),
        *("--server-args", "--dtype float32 --max-model-len 2048"),
        *("--env", "VLLM_CPU_KVCACHE_SPACE=1", "--env", "VLLM_CPU_OMP_THREADS_BIND=nobind"),
    ]
    assert serve.main([str(NEEDLE), *flags, "--out", str(folder)]) == 0
    return folder


def runs_of(folder, workload, side) -> list[Run]:
    files = sorted((folder / "runs").glob(f"{workload}-*/{side}-round?.json"))
    return [Run.model_validate_json(file.read_text()) for file in files]


def test_gate_resumes_conversations_and_documents_as_stock_does(folder):
    gate = results_of(folder).gate
    assert gate.passed
    assert gate.judges_passkeys
    assert gate.compared_tokens == (8 + 4 + 4) * 16


@pytest.mark.parametrize("workload", [MULTI_TURN, DOCUMENTS])
class TestEach:
    def test_right_answers_and_figures(self, folder, workload):
        (point,) = [p for p in results_of(folder).points if p.workload == workload]
        assert [side.side for side in point.sides] == ["stock", "duo-0.5"]
        for side in point.sides:
            assert side.rounds == 2
            assert side.passkeys_asked == 2 * PASSKEYS
            assert side.passkeys_right == side.passkeys_asked
            assert side.ttft_ms.samples == side.tpot_ms.samples == 2 * (TURN_REQUESTS + PASSKEYS)
            for figure in (side.ttft_ms, side.tpot_ms):
                assert 0 < figure.median <= figure.p95 <= figure.p99
            assert 1 <= side.peak_running <= IN_FLIGHT  # sampled: short steps may be missed

    def test_both_sides_hit_what_earlier_requests_of_the_round_left(self, folder, workload):
        for side in ("stock", "duo-0.5"):
            runs = runs_of(folder, workload, side)
            assert len(runs) == 2
            for run in runs:
                requests = read_requests(folder / run.requests_file)
                expected = blocks_seen_before([r.prompt for r in requests])
                assert expected > 0
                assert run.server.prefix_hit_tokens == expected * BLOCK
                assert run.server.prefix_queried_tokens == run.input_tokens


def test_lost_rounds_are_measured_again_and_nothing_else(folder):
    """One of each workload, by the same server, which is started anew."""
    lost = sorted((folder / "runs").glob("*/duo-0.5-round1.json"))
    assert len(lost) == 2
    others = {
        file: file.read_bytes()
        for file in [*folder.glob("runs/*/*-round?.json"), *folder.glob("requests/*")]
        if file not in lost
    }
    before = [Run.model_validate_json(file.read_text()) for file in lost]
    for file in lost:
        file.unlink()
    assert serve.main(["--resume", str(folder)]) == 0
    assert results_of(folder).complete
    after = [Run.model_validate_json(file.read_text()) for file in lost]
    for old, new in zip(before, after, strict=True):
        assert new.started > old.started
        for key in ("requests", "input_tokens", "output_tokens", "passkeys_right"):
            assert getattr(new, key) == getattr(old, key)
        assert new.server.prefix_hit_tokens == old.server.prefix_hit_tokens
    assert {file: file.read_bytes() for file in others} == others


def test_report(folder):
    page = render(load_results([folder]))
    assert "multi-turn" in page
    assert "documents" in page


def blocks_seen_before(prompts: list[str]) -> int:
    """Whole blocks of each prompt that an earlier one begins with, its last token left to compute."""
    texts = Texts(str(NEEDLE))
    counted, seen = 0, []
    for prompt in prompts:
        tokens = texts._tokenizer.encode(prompt).ids
        same = [
            len(list(takewhile(lambda pair: pair[0] == pair[1], zip(tokens, other, strict=False))))
            for other in seen
        ]
        counted += max((min(n, len(tokens) - 1) // BLOCK for n in same), default=0)
        seen.append(tokens)
    return counted
