"""Clients that are forked from one process behave as commands do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.serving.launch import ForkLauncher

ROOT = Path(__file__).resolve().parents[3]
FAKE = """
import os, sys, time
sys.path.insert(0, {root!r})
from benchmarks.serving.bench_client import run_jobs

def client(arguments):
    print("asked", *arguments, "by", os.getppid(), flush=True)
    what, *more = arguments
    if what == "exit":
        sys.exit(more[0] if more[0].isalpha() else int(more[0]))
    if what == "raise":
        raise ValueError("broken")
    if what == "sleep":
        time.sleep(60)

run_jobs(client)
"""


@pytest.fixture
def launcher():
    with ForkLauncher([sys.executable, "-c", FAKE.format(root=str(ROOT))]) as launcher:
        yield launcher


@pytest.fixture
def run(launcher, tmp_path):
    """Runs a client to its end: (exit code, what it printed)."""

    def run(*arguments):
        log = tmp_path / "log"
        code = launcher.start(arguments, log).wait(30)
        return code, log.read_text()

    return run


def test_runs_follow_one_another_in_one_process(run):
    first, second = (run("go", n) for n in "12")
    assert (first[0], second[0]) == (0, 0)
    assert first[1].startswith("asked go 1 by ")
    assert first[1].split()[-1] == second[1].split()[-1], "both are children of the same process"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("exit", "3"), 3, "asked"),
        (("exit", "0"), 0, "asked"),
        (("exit", "wrong"), 1, "wrong\n"),
        (("raise",), 1, "ValueError: broken"),
    ],
)
def test_exit_code_and_output(run, arguments, code, told):
    found, printed = run(*arguments)
    assert found == code
    assert told in printed
    assert run("go")[0] == 0, "the next one is not the worse for it"


def test_one_that_runs_is_waited_for_and_can_be_killed_with_its_group(launcher, run, tmp_path):
    client = launcher.start(["sleep"], tmp_path / "log")
    assert client.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        client.wait(0.1)
    assert os.getpgid(client.pid) == client.pid != os.getpgid(0)
    os.killpg(client.pid, signal.SIGKILL)
    assert client.wait(10) == -signal.SIGKILL
    assert client.poll() == -signal.SIGKILL
    assert run("go")[0] == 0


AT_ONCE = """
import sys
sys.stdin.readline()
sys.stdout.write('{"pid": 1}\\n{"exit": 0}\\n')
sys.stdout.flush()
sys.stdin.read()
"""


def test_an_end_that_comes_with_the_beginning_is_not_missed(tmp_path):
    with ForkLauncher([sys.executable, "-c", AT_ONCE]) as launcher:
        assert launcher.start(["go"], tmp_path / "log").wait(5) == 0


def test_leaving_ends_the_process(tmp_path):
    with ForkLauncher([sys.executable, "-c", FAKE.format(root=str(ROOT))]) as launcher:
        client = launcher.start(["go"], tmp_path / "log")
        client.wait(30)
        parent = int((tmp_path / "log").read_text().split()[-1])
    deadline = time.monotonic() + 10
    while Path(f"/proc/{parent}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{parent}").exists()


def test_vllm_that_cannot_be_imported(tmp_path):
    with (
        ForkLauncher([sys.executable, "-c", "raise SystemExit(1)"]) as launcher,
        pytest.raises(RuntimeError, match="run `vllm bench serve --help`"),
    ):
        launcher.start(["go"], tmp_path / "log")
