"""The servers of a benchmark: started once and loaded in turns, or one up at a time."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from benchmarks.serving import api, metrics
from benchmarks.serving.settings import Settings
from vllm_duo.evaluate.server import ServerProcess, vllm_command
from vllm_duo.report.serve_results import ServedSide

START_TIMEOUT_S = 1200.0
"""Several servers that compile for the first time on few cores take minutes."""
Tell = Callable[[str], None]


class ServerDiedError(RuntimeError):
    """A server ended while it was needed."""


@dataclass
class Running:
    """A server that answers.

    Attributes:
        side: its name.
        process: the server.
        described: what it said at start.
    """

    side: str
    process: ServerProcess
    described: ServedSide

    @property
    def url(self) -> str:
        """Where it listens."""
        return self.process.url

    def check_alive(self) -> None:
        """Look whether it still runs.

        Raises:
            ServerDiedError: it has ended; with the end of its log.
        """
        assert self.process.process is not None, "a stopped server is not in use"
        code = self.process.process.poll()
        if code is not None:
            raise ServerDiedError(
                f"the server {self.side} ended with exit code {code} in the middle of the run; the "
                f"end of {self.process.log}:\n{self.process.log_tail()}"
            )

    def cpu_s(self) -> float:
        """Processor time of all its processes so far, in seconds."""
        assert self.process.process is not None, "a stopped server is not in use"
        total = 0.0
        try:
            parent = psutil.Process(self.process.process.pid)
            for process in (parent, *parent.children(recursive=True)):
                times = process.cpu_times()
                total += times.user + times.system
        except psutil.Error:  # it ends just now, which check_alive() tells
            return total
        return total


class Fleet:
    """Starts servers when they are used; leave the context to stop them all.

    Resident servers cost a machine without GPU nothing while they idle (their processor time is kept
    with the results), and save a start in every round. One GPU's memory holds one server: there they
    run in turn.

    Args:
        settings: of the benchmark.
        logs: folder for the servers' logs.
        tell: gets one line at each start.
        vllm: command in place of ``vllm``.
    """

    def __init__(
        self, settings: Settings, logs: Path, tell: Tell, vllm: Sequence[str] | None = None
    ) -> None:
        self.settings = settings
        self.logs = logs
        self.tell = tell
        self.vllm = list(vllm or [vllm_command()])
        self.resident = is_resident(settings)
        self.running: dict[str, Running] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for side in list(self.running):
            self.stop(side)

    def use(self, side: str) -> Running:
        """The side's server, started if need be; in turn, all others are stopped first.

        Raises:
            ValueError: its port is taken.
            RuntimeError: it does not come up.
        """
        if not self.resident:
            for other in [name for name in self.running if name != side]:
                self.stop(other)
        self.start([side])
        return self.running[side]

    def start(self, sides: Sequence[str]) -> None:
        """Start servers that do not run yet, all at once: most of a start is one core's work.

        Raises:
            ValueError: a port is taken.
            RuntimeError: one does not come up; the others are stopped too.
        """
        wanted = [side for side in sides if side not in self.running]
        launched: dict[str, ServerProcess] = {}
        try:
            for side in wanted:
                launched[side] = self._launch(side)
            for side in wanted:
                self.running[side] = self._ready(side, launched[side])
        except BaseException:
            for side, process in launched.items():
                self.running.pop(side, None)
                process.stop()
            raise

    def stop(self, side: str) -> None:
        """Stop a server if it runs."""
        if side in self.running:
            self.running.pop(side).process.stop()

    def idle_cpu_s(self, used: str) -> float:
        """Processor time so far of all servers but one, in seconds."""
        return sum(server.cpu_s() for side, server in self.running.items() if side != used)

    def _port(self, side: str) -> int | None:
        if self.settings.port is None:
            return None
        # The gate's server comes last, and may find its number in use by none of the sides.
        sides = [*self.settings.sides, "gate"]
        port = self.settings.port + sides.index(side if side in sides else "gate")
        check_port_is_free(port, side)
        return port

    def _launch(self, side: str) -> ServerProcess:
        number = 1 + len(list(self.logs.glob(f"{side}-start*.log")))
        process = ServerProcess(
            self.settings.model,
            self.settings.serve_arguments(side),
            log=self.logs / f"{side}-start{number}.log",
            # The pool's capacity is read from what it logs.
            env={"VLLM_LOGGING_LEVEL": "INFO", **self.settings.env},
            port=self._port(side),
        )
        process.command[:1] = self.vllm
        self.tell(f"starting {side}")
        return process.__enter__()

    def _ready(self, side: str, process: ServerProcess) -> Running:
        process.wait_until_ready(timeout_s=START_TIMEOUT_S)
        log = process.log.read_text(errors="replace")
        tokens, length, requests = metrics.capacity(log)
        described = ServedSide(
            side=side,
            sparsity=self.settings.sparsity_of(side),
            command=process.command,
            max_model_len=api.max_model_len(process.url),
            kv_tokens=tokens,
            concurrent_requests=requests,
            concurrent_request_tokens=length,
        )
        return Running(side, process, described)


def is_resident(settings: Settings) -> bool:
    """Whether all servers stay up."""
    if settings.servers == "auto":
        return shutil.which("nvidia-smi") is None
    return settings.servers == "resident"


def check_port_is_free(port: int, side: str) -> None:
    """Refuse a port that something listens on: it would answer in place of our server.

    Raises:
        ValueError: the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(
                f"--port: expected a free TCP port {port} for the server {side}, got one that is taken "
                f"({error.strerror}): end what listens there, or choose another port"
            ) from None
