"""What a finished run holds, and what its report draws."""

from __future__ import annotations

import json

import pytest

from benchmarks import serve
from tests.benchmarks.serving.fake_run import FAKE, FLAGS
from tests.benchmarks.serving.runs import NEEDLE, results_of
from vllm_duo.report.load import load_results
from vllm_duo.report.render import render


class TestFinished:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("finished") / "run"
        arguments = [str(NEEDLE), *FLAGS.split(), "--sparsity", "0.5", "0.75", "--out", str(folder)]
        assert serve.main(arguments, vllm=FAKE) == 0
        return folder

    def test_every_side_has_every_round(self, folder):
        results = results_of(folder)
        (point,) = results.points
        assert [(side.side, side.rounds) for side in point.sides] == [
            ("stock", 2),
            ("duo-0.5", 2),
            ("duo-0.75", 2),
        ]
        assert results.complete

    def test_figures_of_a_side(self, folder):
        side = results_of(folder).points[0].sides[1]
        # Fake latencies: 0.1 s to the first token, 10 ms for each further one.
        assert side.ttft_ms.median == pytest.approx(100)
        assert side.tpot_ms.p99 == pytest.approx(10)
        assert side.e2e_ms.median == pytest.approx(130)  # 4 of 6 requests have 4 tokens
        assert side.e2e_ms.samples == 12
        assert side.itl_ms.samples == 2 * (4 * 3 + 2 * 11)
        assert side.output_tokens_per_s.median == (4 * 4 + 2 * 12) / 2
        assert side.times_stock_output.median == 1.0
        assert side.prefix_hit_rate == 0.25
        assert side.preemptions == 12  # the fake counts one a request
        assert side.peak_kv_share == 0.25
        assert (side.passkeys_right, side.passkeys_asked) == (4, 4)

    def test_all_sides_get_the_same_requests_and_rounds_differ(self, folder):
        files = sorted((folder / "requests").iterdir())
        assert len(files) == 2
        assert files[0].read_text() != files[1].read_text()
        for run in (folder / "runs").rglob("*-round1.json"):
            assert json.loads(run.read_text())["requests_file"] == f"requests/{files[1].name}"

    def test_commands_versions_and_logs_are_kept(self, folder):
        results = results_of(folder)
        stock, half, _ = results.sides
        assert "--attention-backend" not in stock.command
        assert json.loads(half.command[half.command.index("--additional-config") + 1]) == {
            "duo": {"sparsity": 0.5}
        }
        assert half.kv_tokens == 12_345
        assert (half.concurrent_requests, half.concurrent_request_tokens) == (6.03, 2048)
        assert {"vllm", "cpu", "cores", "commit"} <= results.versions.keys()
        assert "Maximum concurrency" in (folder / "servers" / "stock-start1.log").read_text()
        run = json.loads(next((folder / "runs").rglob("stock-round0.json")).read_text())
        assert {"--save-detailed", "--ignore-eos"} <= set(run["client_command"])

    def test_the_gates_server_is_measured_nowhere(self, folder):
        assert (folder / "servers" / "duo-0-start1.log").exists()
        assert results_of(folder).gate.compared_tokens == 8 * 16
        assert {s.side for p in results_of(folder).points for s in p.sides}.isdisjoint({"duo-0"})

    def test_resuming_a_finished_run_starts_nothing(self, folder, bench):
        code, _ = bench("--resume", folder)
        assert code == 0
        assert not list((folder / "servers").glob("*-start2.log"))

    def test_report_draws_it(self, folder):
        page = render(load_results([folder]))
        assert "12,345" in page
        assert "duo-0.75" in page
        assert page.count("<svg") == 1  # capacity: one load makes no curve

    def test_in_turn_gives_the_same_figures(self, folder, new_run):
        code, _, other = new_run("--servers", "in-turn", "--sparsity", "0.5", "0.75")
        assert code == 0
        assert [p.sides for p in results_of(other).points] == [
            p.sides for p in results_of(folder).points
        ]
        # Stopped for the others, and started again: for the gate, and in each round.
        assert len(list((other / "servers").glob("stock-start*.log"))) == 3
