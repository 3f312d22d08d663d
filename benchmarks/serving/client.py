"""One point on one server: vLLM's own client sends the requests, /metrics is sampled meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.serving import api, metrics
from benchmarks.serving.launch import Client, Launcher
from benchmarks.serving.settings import Point
from vllm_duo.evaluate.logs import log_tail
from vllm_duo.report.serve_results import ServerCounts

SAMPLE_EVERY_S = 0.25
UNREACHABLE_AFTER_S = 60.0
DYING_S = 2.0
"""Seconds that a server which does not answer is given to end.

Its sockets close before its process can be waited for. Of a killed one that is less than a millisecond
(measured with 1 GiB of memory); one that ends by itself stops its engine in between. 2 s leave room for
that on a busy machine. They are only waited on the way to an error; a server that takes longer is told
as one that does not answer.
"""


@dataclass(frozen=True, kw_only=True)
class Load:
    """One run of the client.

    Attributes:
        url: of the server.
        model: whose tokenizer the client counts with.
        point: the load.
        requests: the dataset, and how many lines it has.
        count: its lines.
        seed: of the arrivals.
        result: file that takes the client's results, raw samples included.
        log: file that takes the client's output.
        timeout_s: longest that it may take.
    """

    url: str
    model: str
    point: Point
    requests: Path
    count: int
    seed: int
    result: Path
    log: Path
    timeout_s: float


def client_arguments(load: Load) -> list[str]:
    """Flags of ``vllm bench serve``, every setting spelt out."""
    flags: dict[str, Any] = {
        "--backend": "vllm",
        "--base-url": load.url,
        "--endpoint": "/v1/completions",
        "--model": "benchmark",
        "--tokenizer": load.model,
        "--dataset-name": "custom",
        "--dataset-path": load.requests,
        "--custom-output-len": -1,
        "--num-prompts": load.count,
        "--seed": load.seed,
        "--temperature": 0,
        "--percentile-metrics": "ttft,tpot,itl,e2el",
        "--metric-percentiles": "50,95,99",
        "--result-dir": load.result.parent,
        "--result-filename": load.result.name,
    }
    if load.point.rate is not None:
        flags["--request-rate"] = load.point.rate
    else:
        flags["--max-concurrency"] = load.point.concurrency
    switches = [
        "--skip-chat-template",
        "--disable-shuffle",
        "--no-oversample",
        "--ignore-eos",
        "--save-result",
        "--save-detailed",
        "--disable-tqdm",
    ]
    return [*(str(x) for pair in flags.items() for x in pair), *switches]


def run_client(
    load: Load, launcher: Launcher, check_alive: Callable[[], None]
) -> tuple[dict[str, Any], ServerCounts]:
    """Run the client and sample the server's metrics until it ends.

    Args:
        load: what to run.
        launcher: starts it.
        check_alive: raises if the server has ended.

    Returns:
        The client's results, and what the server counted.

    Raises:
        ServerDiedError: the server ended; the client was stopped.
        UnreachableError: the server runs and has not answered for a minute.
        RuntimeError: the client failed, took too long, or a request was not answered.
    """
    try:
        samples = [metrics.read_sample(api.metrics_text(load.url))]
        load.result.parent.mkdir(parents=True, exist_ok=True)
        client = launcher.start(client_arguments(load), load.log)
        try:
            _watch(client, load, samples, check_alive)
        finally:
            _end(client)
        if not client.returncode:
            samples.append(metrics.read_sample(api.metrics_text(load.url)))
    except api.UnreachableError:
        raise_if_dying(check_alive)
        raise
    if client.returncode:
        raise_if_dying(check_alive)
        raise RuntimeError(
            f"vllm bench serve ended with exit code {client.returncode}; the end of {load.log}:\n"
            f"{log_tail(load.log)}"
        )
    raw: dict[str, Any] = json.loads(load.result.read_text())
    errors = [error for error in raw["errors"] if error]
    if raw["failed"] or errors:
        raise_if_dying(check_alive)
        first = errors[0].strip().splitlines()[-1] if errors else "no reason told"
        raise RuntimeError(
            f"{load.point.key}: expected {load.count} answers, {raw['failed']} requests failed, the "
            f"first with: {first}; see the server's log, and {load.log}"
        )
    if raw["completed"] != load.count:
        raise RuntimeError(
            f"{load.point.key}: expected {load.count} answers, got {raw['completed']}: see {load.log}"
        )
    return raw, metrics.counts(samples)


def raise_if_dying(check_alive: Callable[[], None]) -> None:
    """Tell of a server's end rather than of what that led to; one that lives costs ``DYING_S``.

    Args:
        check_alive: raises if the server has ended; asked until it does, or for ``DYING_S`` seconds.

    Raises:
        ServerDiedError: it has.
    """
    end = time.monotonic() + DYING_S
    while time.monotonic() < end:
        check_alive()
        time.sleep(0.05)


def _watch(
    client: Client,
    load: Load,
    samples: list[metrics.Sample],
    check_alive: Callable[[], None],
) -> None:
    """Until the client ends; a busy server may miss some samples, but not all for a minute."""
    start = answered = time.monotonic()
    while True:
        try:
            client.wait(SAMPLE_EVERY_S)
            return
        except subprocess.TimeoutExpired:
            pass
        check_alive()
        now = time.monotonic()
        if now - start > load.timeout_s:
            raise RuntimeError(
                f"{load.point.key}: expected the client to end within {load.timeout_s:g} s, it still "
                "runs: send fewer requests or a lower load, or raise --point-timeout-s"
            )
        try:
            samples.append(metrics.read_sample(api.metrics_text(load.url)))
            answered = time.monotonic()
        except api.UnreachableError:
            if now - answered > UNREACHABLE_AFTER_S:
                raise


def _end(client: Client) -> None:
    """Kill it if it still runs."""
    if client.poll() is None:
        os.killpg(client.pid, signal.SIGKILL)
        client.wait()
