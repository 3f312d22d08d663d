"""SIGKILL at moments that nothing can prepare for: ``--resume`` gives the result of a whole run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest

from vllm_duo import HeadPattern
from vllm_duo.identify.checkpoint import CHECKPOINT_NAME

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

KILLS = int(os.environ.get("VLLM_DUO_KILLS", "2"))
"""Of each method."""
RETRIES = 4
"""More of them, each in half the time, while none has come before the end."""
TABLE = "full_attention_heads.tsv"
# As many as keep a run busy for seconds, beside the imports that it begins with.
METHODS = {
    "gates": ("--steps", "80"),
    "retrieval-score": ("--samples", "250"),
    "induction": ("--samples", "60"),
    "on-the-fly": ("--samples", "120"),
    "exclusive": (),
}


@pytest.fixture
def command(model_folder, tmp_path):
    """The command line of a method, but for --out."""

    def command(method: str) -> list[str]:
        flags = ["--method", method, *METHODS[method], "--checkpoint-every", "1"]
        flags += [
            "--sink-size",
            "4",
            "--recent-size",
            "12",
            "--max-length",
            "96",
            "--min-length",
            "80",
        ]
        if method == "exclusive":
            values = np.array([[0.9, 0.1], [0.2, 0.3]])
            HeadPattern(values, {"method": "gates"}).save(tmp_path / "source")
            # It has nothing to compute but the self-check.
            flags += ["--from", str(tmp_path / "source"), "--check-samples", "200"]
        else:
            flags += ["--check-samples", "10"]
        main = "from vllm_duo.cli.main import main; main()"
        return [sys.executable, "-c", main, "identify", str(model_folder), *flags]

    return command


def start(command: list[str], out: Path, *more: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*command, "--out", str(out), *more],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(file: Path, process: subprocess.Popen[bytes]) -> None:
    while not file.exists() and process.poll() is None:
        time.sleep(0.005)


def written(folder: Path) -> dict[str, bytes | str]:
    """All that is a result: every file, less the times and the memory that were measured."""
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    config = json.loads(found.pop("config.json"))
    del config["measured"]
    report = found.pop("REPORT.md").decode().splitlines()
    told = [line for line in report if "self-check" not in line or "peak memory" not in line]
    return found | {"config.json": json.dumps(config), "REPORT.md": "\n".join(told)}


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed(command, tmp_path, method):
    began = time.monotonic()
    assert start(command(method), tmp_path / "whole").wait() == 0
    seconds = time.monotonic() - began
    whole = written(tmp_path / "whole")
    measured = json.loads((tmp_path / "whole" / "config.json").read_text())["measured"]
    busy = measured["seconds"] + measured["check_seconds"]
    random = Random(method)
    seen = []
    share, resumed, number = 1.0, 0, 0
    while number < KILLS or (not resumed and number < KILLS + RETRIES):
        out = tmp_path / f"killed{number}"
        process = start(command(method), out)
        if METHODS[method]:
            # From the first checkpoint to the moment when all is written.
            wait_for(out / CHECKPOINT_NAME, process)
            after = random.uniform(0.0, busy)
        else:
            after = random.uniform(max(0.0, seconds - 1.5 * busy), seconds)
        after *= share
        number += 1
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        left = sorted(file.name for file in out.iterdir()) if out.exists() else []
        seen.append((round(after, 2), code, left))
        if code == 0 or (TABLE in left and CHECKPOINT_NAME not in left):
            # It had ended before, or at least written all: the folder is whole.
            assert written(out) == whole
            share /= 2
            continue
        assert code == -signal.SIGKILL, seen
        assert CHECKPOINT_NAME in left or not METHODS[method], seen
        assert start(command(method), out, "--resume").wait() == 0, seen
        assert written(out) == whole, seen
        resumed += 1
    assert resumed, f"no kill came before the end, so nothing was resumed: {seen}"
    print(f"\n{method}: {seconds:.1f} s, {busy:.1f} s of them busy; killed: {seen}")  # noqa: T201
