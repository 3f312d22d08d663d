"""A server's end with the process that started it, and the end of its log."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest

from vllm_duo.evaluate.logs import TAIL_LINES, log_tail
from vllm_duo.evaluate.server import end_with

WAITS = [sys.executable, "-c", "import time; print('started', flush=True); time.sleep(60)"]


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
class TestEndWith:
    def test_a_child_whose_parent_is_there_starts(self):
        code = subprocess.call(
            [sys.executable, "-c", "raise SystemExit(7)"], preexec_fn=partial(end_with, os.getpid())
        )
        assert code == 7

    def test_a_parent_that_ended_before_the_kernel_was_asked(self):
        """As if it had been another process: its program never starts."""
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        child = subprocess.run(
            WAITS, preexec_fn=partial(end_with, gone.pid), stdout=subprocess.PIPE, check=False
        )
        assert (child.returncode, child.stdout) == (1, b"")


def test_tail_of_a_log(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"".join(b"line %d\n" % n for n in range(100)) + b"caf\xe9\n")
    tail = log_tail(log).splitlines()
    assert len(tail) == TAIL_LINES
    assert (tail[0], tail[-1]) == (f"line {101 - TAIL_LINES}", "caf\ufffd")
