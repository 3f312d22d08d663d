"""Whole engines under vLLM's model runner V2, against the oracle."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

HERE = Path(__file__).parent
TIGHT = "test_tight_pool.py"
# Preemption, aborts, batches of 32 and of one; chats, branches and prompts that arrive at once; shapes.
OTHERS = (
    "test_scheduling.py",
    "test_prefix_caching.py",
    "test_exactness.py",
    "test_sliding_windows.py",
)


def run(*files: str, chosen: str = "not compiled") -> str:
    """Run tests of this folder under the plugin, in a process of its own.

    Args:
        files: names.
        chosen: which of their tests; torch.compile would ask the stand-in for a device.

    Returns:
        What they said.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.e2e.runner_v2"]
    command += ["-m", "not slow and not soak", "-k", chosen]
    done = subprocess.run(
        [*command, *(str(HERE / file) for file in files)],
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def test_hits_in_a_tight_pool():
    """Several bins without a spare block: chunks, hits at many lengths, snapshots both ways."""
    assert re.search(r"^1 passed", run(TIGHT, chosen="several"), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_else():
    assert re.search(r"^\d+ passed", run(TIGHT, *OTHERS), re.MULTILINE)
