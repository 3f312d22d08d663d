"""The benchmark, a server or the client ends in the middle of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.serving import api, client, servers
from tests.benchmarks.serving.fake_run import FAKE, FLAGS
from tests.benchmarks.serving.runs import NEEDLE, results_of


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
