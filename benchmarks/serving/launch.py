"""Starts clients: each by its own command, or all by one process that has imported vLLM already."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

SERVER = Path(__file__).with_name("bench_client.py")
STOP_TIMEOUT_S = 10.0


class Client(Protocol):
    """A client that was started; as much of ``subprocess.Popen`` as is used."""

    pid: int
    returncode: int | None

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; raises ``subprocess.TimeoutExpired`` if it runs longer, in seconds."""
        ...

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        ...


class Launcher(Protocol):
    """Starts a client with flags of ``vllm bench serve``, and a file that takes its output."""

    def start(self, arguments: Sequence[str], log: Path) -> Client:
        """Start it in a process group of its own."""
        ...


class CommandLauncher:
    """Runs a command for each client.

    Args:
        command: in place of ``vllm``.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)

    def start(self, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """As ``Launcher``."""
        with log.open("wb") as out:
            return subprocess.Popen(
                [*self.command, "bench", "serve", *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


class ForkLauncher:
    """Forks each client from one process; use it as a context manager.

    Args:
        command: of that process, as ``bench_client.py``.
    """

    def __init__(self, command: Sequence[str] = (sys.executable, str(SERVER))) -> None:
        self.command = list(command)
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            try:
                self._server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._server.pid, signal.SIGKILL)
                self._server.wait()

    def start(self, arguments: Sequence[str], log: Path) -> ForkedClient:
        """As ``Launcher``.

        Raises:
            RuntimeError: the process that imports vLLM ended.
        """
        if self._server is None:
            self._server = subprocess.Popen(
                self.command,
                # Unbuffered: a line that has been read ahead is one that select does not see.
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        assert self._server.stdin is not None
        job = {"arguments": list(arguments), "log": str(log.absolute())}
        try:
            self._server.stdin.write(json.dumps(job).encode() + b"\n")
            self._server.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(_ENDED) from None
        return ForkedClient(self._server)


_ENDED = (
    "the process that runs vLLM's client ended before its time: run `vllm bench serve --help` to see "
    "whether vLLM can be imported"
)


class ForkedClient:
    """A client that ``bench_client.py`` forked."""

    def __init__(self, server: subprocess.Popen[bytes]) -> None:
        self._server = server
        self.returncode: int | None = None
        self.pid = self._read("pid")

    def wait(self, timeout: float | None = None) -> int:
        """As ``Client``."""
        if self.returncode is None:
            if not select.select([self._server.stdout], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("vllm bench serve", timeout or 0.0)
            self.returncode = self._read("exit")
        return self.returncode

    def poll(self) -> int | None:
        """As ``Client``."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def _read(self, key: str) -> int:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(_ENDED)
        return int(json.loads(line)[key])
