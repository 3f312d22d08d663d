"""``benchmarks.serve`` with a fake vLLM: what it measures, keeps, refuses, and how it ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import serve
from benchmarks.serving import api, client, servers
from vllm_duo.report.load import load_results
from vllm_duo.report.render import render
from vllm_duo.report.serve_results import ServeResults

NEEDLE = Path(__file__).resolve().parents[2] / "models" / "needle"
FAKE = [sys.executable, str(Path(__file__).with_name("fake_vllm.py"))]
FLAGS = (
    "--lengths 128 --output-tokens 4 --requests 4 --concurrencies 2 --rounds 2 --passkey-share 0.5"
)


@pytest.fixture
def bench(tmp_path, capfd):
    """Runs the command with the fake vLLM: (exit code, stdout + stderr)."""

    def bench(*arguments, env=()):
        variables = [x for pair in env for x in ("--env", pair)]
        code = serve.main([*map(str, arguments), *variables], vllm=FAKE)
        return code, "".join(capfd.readouterr())

    return bench


def results_of(folder) -> ServeResults:
    return ServeResults.model_validate_json((folder / "results.json").read_text())


@pytest.fixture
def new_run(bench, tmp_path):
    def new_run(*more, env=()):
        return *bench(NEEDLE, *FLAGS.split(), *more, "--out", tmp_path / "run", env=env), (
            tmp_path / "run"
        )

    return new_run


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


class TestPromptsThatBeginAlike:
    """Conversations, and questions about the user's documents."""

    FLAGS = (
        "--lengths 256 --output-tokens 4 --requests 8 --concurrencies 2 --rounds 2 "
        "--passkey-share 0.25"
    )

    @pytest.fixture
    def documents(self, tmp_path):
        folder = tmp_path / "documents"
        folder.mkdir()
        words = " ".join(f"the lamp of farmer number {i}" for i in range(300))
        (folder / "a.txt").write_text(words)
        return folder

    @pytest.fixture
    def run(self, bench, documents, tmp_path):
        flags = [*self.FLAGS.split(), "--workloads", "multi-turn", "documents"]
        folder = tmp_path / "run"
        return bench(NEEDLE, *flags, "--documents", documents, "--out", folder), folder

    def test_both_are_measured_on_both_sides(self, run):
        (code, output), folder = run
        assert code == 0, output
        results = results_of(folder)
        assert results.complete
        assert [(p.workload, [(s.side, s.rounds) for s in p.sides]) for p in results.points] == [
            (workload, [("stock", 2), ("duo-0.5", 2)]) for workload in ("multi-turn", "documents")
        ]
        for point in results.points:
            for side in point.sides:
                assert (side.passkeys_right, side.passkeys_asked) == (4, 4)
                assert side.prefix_hit_rate == 0.25
                assert side.ttft_ms.samples == 2 * (8 + 2)

    def test_gate_asks_one_of_each_too(self, run):
        # 4 random texts and 4 pass keys, 4 turns of a conversation, 4 questions about a document.
        assert results_of(run[1]).gate.compared_tokens == (8 + 4 + 4) * 16

    def test_no_round_has_another_ones_prompts(self, run):
        kept = [file.read_text().splitlines() for file in (run[1] / "requests").iterdir()]
        assert len(kept) == 4
        assert len({line for lines in kept for line in lines}) == sum(map(len, kept))

    def test_a_run_goes_on_with_the_requests_it_had(self, run, bench, documents):
        """Although the user's texts have changed: all sides of a round get the same."""
        _, folder = run
        kept = {file: file.read_bytes() for file in (folder / "requests").iterdir()}
        (documents / "a.txt").write_text("other words now " * 1000)
        (lost,) = (folder / "runs").glob("documents-*/duo-0.5-round1.json")
        lost.unlink()
        code, output = bench("--resume", folder)
        assert code == 0, output
        assert results_of(folder).complete
        assert json.loads(lost.read_text())["passkeys_right"] == 2
        assert {file: file.read_bytes() for file in kept} == kept

    def test_too_little_text_is_told_before_any_server_starts(self, bench, documents, tmp_path):
        (documents / "a.txt").write_text("a few words")
        flags = [*self.FLAGS.split(), "--workloads", "documents", "--documents", documents]
        code, output = bench(NEEDLE, *flags, "--out", tmp_path / "run")
        assert code == 2
        assert "tokens of text, for 5 pieces of" in output
        assert not (tmp_path / "run").exists()


class TestDataset:
    """The user's own prompts, in an open loop at several rates and in a closed one."""

    FLAGS = (
        "--workloads dataset --output-tokens 4 --requests 4 --rates 2 50 --concurrencies 2 --rounds 2 "
        "--passkey-share 0.25"
    )

    @pytest.fixture
    def run(self, bench, tmp_path):
        """Runs with lines of a dataset: (exit code, output, folder)."""

        def run(lines):
            file, folder = tmp_path / "own.jsonl", tmp_path / "run"
            file.write_text("\n".join(lines) + "\n")
            flags = [*self.FLAGS.split(), "--dataset", file, "--out", folder]
            return *bench(NEEDLE, *flags), folder

        return run

    def lines(self):
        return [
            json.dumps({"prompt": f"Prompt {n}.", "output_tokens": 3 + n % 2}) for n in range(24)
        ]

    def test_every_line_is_asked_once_on_every_side(self, run):
        code, output, folder = run(self.lines())
        assert code == 0, output
        results = results_of(folder)
        loads = [point.key.removeprefix("dataset-0-4-") for point in results.points]
        assert loads == ["rate2", "rate50", "closed2"]
        asked = []
        for file in (folder / "requests").iterdir():
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            asked += [row["prompt"] for row in rows if not row["answer"]]
        assert sorted(asked) == sorted(f"Prompt {n}." for n in range(24))
        for point in results.points:
            for side in point.sides:
                assert (side.rounds, side.passkeys_asked, side.passkeys_right) == (2, 2, 2)
                # Four of five have 3 or 4 tokens by turns, the pass key 12.
                assert side.itl_ms.samples == 2 * (2 * 2 + 2 * 3 + 11)

    def test_the_clients_load_is_the_points(self, run):
        _, _, folder = run(self.lines())
        for key, flags in {
            "rate2": ["--request-rate", "2.0"],
            "rate50": ["--request-rate", "50.0"],
            "closed2": ["--max-concurrency", "2"],
        }.items():
            files = list((folder / "runs" / f"dataset-0-4-{key}").glob("*-round?.json"))
            assert len(files) == 4
            for file in files:
                command = json.loads(file.read_text())["client_command"]
                at = command.index(flags[0])
                assert command[at : at + 2] == flags
                assert ("--request-rate" in command) != ("--max-concurrency" in command)

    def test_broken_lines_are_told_before_any_server_and_leave_the_folder_free(self, run):
        lines = self.lines()
        code, output, folder = run([*lines[:3], '{"prompt": ', *lines[4:], "[1]"])
        assert code == 2
        assert "own.jsonl: expected one JSON object a line" in output
        assert "got 2 broken lines" in output
        assert "line 4: no JSON" in output
        assert "line 25: an object was expected, got list" in output
        assert not folder.exists()
        assert run(lines)[0] == 0

    def test_too_few_lines(self, run):
        code, output, folder = run(self.lines()[:23])
        assert code == 2
        assert "expected 24 lines, one for each request of 2 rounds of all points" in output
        assert not folder.exists()


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs: one that ended may wait for its new parent."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class TestKilled:
    """The benchmark itself, by SIGKILL, which no handler sees."""

    @pytest.fixture
    def killed(self, tmp_path):
        """A run that was killed in the middle: (folder, processes that it had started)."""
        folder = tmp_path / "run"
        arguments = [str(NEEDLE), *FLAGS.split(), "--out", str(folder)]
        code = f"from benchmarks import serve; serve.main({arguments!r}, vllm={FAKE!r})"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=NEEDLE.parents[1],
            env=os.environ | {"FAKE_PAUSE_S": "0.3"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while not list(folder.glob("runs/*/*-round1.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        return folder, started

    def test_its_servers_end_with_it_and_it_goes_on(self, killed, bench):
        folder, started = killed
        assert len(started) >= 2  # servers; a client may just have ended
        deadline = time.monotonic() + 30
        while any(map(is_alive, started)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not results_of(folder).complete
        kept = {file: file.read_bytes() for file in folder.glob("runs/*/*-round?.json")}
        assert kept
        code, output = bench("--resume", folder)
        assert code == 0, output
        assert results_of(folder).complete
        assert {file: file.read_bytes() for file in kept} == kept
        assert len(list(folder.glob("runs/*/*-round?.json"))) == 4


def late(check_alive):
    """Tells of a death only the third time it is asked, as of a process that is still ending."""
    asked = {}

    def check(self):
        asked[self.side] = asked.get(self.side, 0) + 1
        if asked[self.side] > 2:
            check_alive(self)

    return check


class TestServerDies:
    def test_partial_results_are_kept_and_resumed(self, new_run, bench, tmp_path):
        # 8 + 1 gate and warm-up answers, 6 in round 0, and 2 into round 1.
        code, output, folder = new_run(env=["FAKE_DIE_AFTER=stock:18"])
        assert code == 1
        assert "the server stock ended with exit code 9 in the middle of the run" in output
        assert f"--resume {folder}" in output
        partial = results_of(folder)
        assert not partial.complete
        assert [side.rounds for side in partial.points[0].sides] == [1, 2]
        settings = json.loads((folder / "settings.json").read_text())
        settings["env"] = {}  # the cause is gone
        (folder / "settings.json").write_text(json.dumps(settings))
        kept = {file: file.stat().st_mtime_ns for file in folder.rglob("*-round0.json")}
        assert bench("--resume", folder)[0] == 0
        assert results_of(folder).complete
        assert {file: file.stat().st_mtime_ns for file in kept} == kept

    @pytest.mark.parametrize("answers", [4, 14])
    def test_in_the_gate_and_between_two_runs(self, new_run, answers, monkeypatch):
        """Nothing but a refused connection tells of it."""
        # 8 answers of the gate, 1 to warm up, 6 of round 0: the 14th is stock's last but one.
        monkeypatch.setattr(servers.Running, "check_alive", late(servers.Running.check_alive))
        code, output, folder = new_run(env=[f"FAKE_DIE_AFTER=stock:{answers}"])
        assert code == 1
        assert "the server stock ended with exit code 9 in the middle of the run" in output
        assert not (folder / "runs").exists() or not list((folder / "runs").glob("*/*-round?.json"))

    def test_at_start(self, new_run):
        code, output, folder = new_run(env=["FAKE_NO_START=duo"])
        assert code == 1
        assert "vllm serve ended with exit code 3 before it was ready" in output
        assert "no memory left" in output
        assert not (folder / "results.json").exists()

    def test_alive_and_silent(self, new_run, monkeypatch):
        monkeypatch.setattr(api, "TIMEOUT_S", 0.2)
        monkeypatch.setattr(client, "UNREACHABLE_AFTER_S", 0.5)
        monkeypatch.setenv("FAKE_PAUSE_S", "1")
        code, output, folder = new_run(env=["FAKE_SILENT=duo"])
        assert code == 1
        assert "/metrics: expected an answer within 0.2 s, got none" in output
        assert [side.side for side in results_of(folder).points[0].sides] == ["stock"]


class TestClientFails:
    @pytest.mark.parametrize(
        ("variable", "message"),
        [
            ("FAKE_EXIT=7", "vllm bench serve ended with exit code 1; the end of"),
            (
                "FAKE_FAILED=2",
                "expected 6 answers, 2 requests failed, the first with: Timeout: gone",
            ),
        ],
    )
    def test_no_figures_of_that_run(self, new_run, monkeypatch, variable, message):
        monkeypatch.setenv(*variable.split("="))
        code, output, folder = new_run()
        assert code == 1
        assert message in output
        assert results_of(folder).points == []

    def test_takes_too_long(self, new_run, monkeypatch):
        monkeypatch.setenv("FAKE_PAUSE_S", "30")
        code, output, _ = new_run("--point-timeout-s", "1")
        assert code == 1
        assert "expected the client to end within 1 s, it still runs" in output


class TestGate:
    def test_other_tokens_and_lost_keys_stop_it(self, new_run):
        code, output, folder = new_run(env=["FAKE_WRONG=duo"])
        assert code == 1
        assert "expected stock's token 5, got 7" in output
        assert "duo-0.5: expected the 4 pass keys that stock finds, got 4 of them wrong" in output
        assert results_of(folder).points == []
        assert not (folder / "runs").exists()

    def test_near_ties_pass_where_they_are_allowed(self, new_run):
        code, _, folder = new_run("--gate-tie-nats", "0.06", env=["FAKE_WRONG=duo"])
        gate = results_of(folder).gate
        assert code == 1  # for the pass keys
        assert gate.differences == []
        assert gate.near_ties == 8

    def test_red_gate_is_run_again(self, new_run, bench):
        _, _, folder = new_run(env=["FAKE_WRONG=duo"])
        code, output = bench("--resume", folder)
        assert code == 1
        assert "the correctness gate is red" in output

    def test_report_refuses_a_red_gate(self, new_run):
        _, _, folder = new_run(env=["FAKE_WRONG=duo"])
        with pytest.raises(ValueError, match=r"found none \(its correctness gate is red\)"):
            render(load_results([folder]))

    def test_a_model_that_finds_no_keys_is_not_judged(self, new_run):
        code, _, folder = new_run("--passkey-share", "0.5", env=["FAKE_WRONG=stock"])
        assert code == 1  # the tokens differ
        assert not results_of(folder).gate.judges_passkeys


class TestBadInput:
    def test_port_taken(self, new_run):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            code, output, _ = new_run("--port", str(port))
        assert code == 2
        assert (
            f"expected a free TCP port {port} for the server stock, got one that is taken" in output
        )

    def test_folder_with_files(self, new_run, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "notes.txt").write_text("")
        code, output, _ = new_run()
        assert code == 2
        assert "expected a new or an empty folder, found files" in output

    def test_resuming_an_empty_folder(self, bench, tmp_path):
        code, output = bench("--resume", tmp_path)
        assert code == 2
        assert "expected the folder of a run with settings.json, found none" in output

    def test_resuming_with_other_settings(self, bench, tmp_path, new_run):
        _, _, folder = new_run(env=["FAKE_NO_START=duo"])
        code, output = bench("--resume", folder, "--seed", "5", "--rounds", "2")
        assert code == 2
        assert "(seed: 0 there, 5 given)" in output

    def test_resuming_on_another_machine(self, bench, new_run):
        _, _, folder = new_run(env=["FAKE_NO_START=duo"])
        file = folder / "versions.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"cpu": "Another"}))
        code, output = bench("--resume", folder)
        assert code == 2
        assert "(cpu: 'Another' there," in output

    def test_prompts_longer_than_the_server_takes(self, new_run):
        code, output, _ = new_run("--lengths", "2046")
        assert code == 2
        assert "expected at most 2048 tokens" in output
        assert "got 2046 + 4" in output

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--workloads documents", "'documents' and --documents DIR go together"),
            ("--sparsity 0.5 0.5", "each sparsity can be measured once, got twice: 0.5"),
            ("--sparsity 1.5", "sparsities.0: Input should be less than or equal to 1, got 1.5"),
            ("--workloads multi-turn --rates 1", "expected at least one point, got none"),
            ("--workloads multi-turn --requests 8", "at least 4 requests for each one in flight"),
            ("--requests 1 2 3", "expected one number, or one for each of the 1 lengths, got 3"),
            ("--requests 0", "requests: Input should be greater than or equal to 1, got 0"),
            ("--env WRONG", "--env: expected NAME=VALUE, got 'WRONG'"),
        ],
    )
    def test_flags(self, bench, tmp_path, flags, message):
        code, output = bench(NEEDLE, *flags.split(), "--out", tmp_path / "run")
        assert code == 2
        assert message in " ".join(output.split())
        assert not (tmp_path / "run").exists()

    def test_neither_out_nor_resume(self, bench):
        code, output = bench(NEEDLE)
        assert code == 2
        assert "expected --out DIR for a new run or --resume DIR" in output
