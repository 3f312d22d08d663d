"""Forward-only methods over Ray: one model a worker, samples in any order, results in theirs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import torch

from vllm_duo.identify.methods import Floats, Job
from vllm_duo.identify.model import load_model
from vllm_duo.identify.registry import FORWARD_METHODS
from vllm_duo.identify.settings import IdentifySettings

MOST_WORKERS = 64
# Ray gives its own processes 30 seconds to start, too few on a machine that is busy.
_PATIENCE = {"RAY_raylet_start_wait_time_s": "180", "RAY_agent_register_timeout_ms": "180000"}


class Scorer:
    """Holds the model in a worker process.

    Args:
        model_name: as in this process: the worker's machine must have it under the same name.
        settings: the run's complete settings.
        fingerprint: of the model here.
        threads: of torch; as many as here, so that sums come out the same.
    """

    def __init__(
        self, model_name: str, settings: dict[str, Any], fingerprint: str, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        complete = IdentifySettings(**settings)
        model = load_model(model_name, device=complete.device, dtype=complete.dtype)
        if model.info.fingerprint != fingerprint:
            raise ValueError(
                f"model {model_name}: expected fingerprint {fingerprint} on every machine, found "
                f"{model.info.fingerprint} on this one: copy the same checkpoint to all"
            )
        self._job = Job(model, complete)

    def score(self, index: int) -> Floats:
        """Raw scores of one sample."""
        return FORWARD_METHODS[self._job.settings.method].score(self._job, index)


def score_over_ray(job: Job, indices: range, address: str) -> Iterator[Floats]:
    """Raw scores of the samples, in the order of `indices`.

    Args:
        job: model and settings.
        indices: numbers of the samples.
        address: "local" for processes on this machine, else that of a Ray cluster whose machines
            have this package, the model and the text under the same names.

    Raises:
        RuntimeError: Ray is not installed, did not start, or there is no cluster at `address`.
    """
    try:
        import ray
    except ImportError:
        raise RuntimeError(
            "--ray: expected Ray to be installed, it is not: pip install 'vllm-duo[identify]'"
        ) from None
    if address != "local":
        check_reachable(address)
    start: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
    threads = torch.get_num_threads()
    try:
        if address == "local":
            for name, patience in _PATIENCE.items():
                os.environ.setdefault(name, patience)
            ray.init(address="local", **start)
        else:
            ray.init(address=address, log_to_driver=False)
    except Exception as error:  # Ray raises bare ones when a node does not start in time
        raise RuntimeError(
            f"--ray {address}: expected 'local' or the address of a running Ray cluster, but Ray "
            f"did not start ({str(error).splitlines()[0]})"
        ) from None
    try:
        yield from _spread(ray, job, indices, threads)
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Knock at HOST:PORT or ray://HOST:PORT first: Ray itself waits long for what is not there.

    Raises:
        RuntimeError: nothing listens there.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # "auto", which Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise RuntimeError(
            f"--ray {address}: expected 'local' or the address of a running Ray cluster, but nothing "
            f"answers there ({error})"
        ) from None


def _spread(ray: Any, job: Job, indices: range, threads: int) -> Iterator[Floats]:
    on_gpu = job.model.device.type == "cuda"
    resources = ray.cluster_resources()
    share = {"num_gpus": 1, "num_cpus": 1} if on_gpu else {"num_cpus": threads}
    fitting = [int(resources.get("CPU", 1) // share["num_cpus"])]
    if on_gpu:
        fitting.append(int(resources.get("GPU", 0)))
    workers = max(1, min(*fitting, len(indices), MOST_WORKERS))
    settings = job.settings.model_dump(mode="json")
    remote = ray.remote(**share)(Scorer)
    scorers = [
        remote.remote(job.model.info.name, settings, job.model.info.fingerprint, threads)
        for _ in range(workers)
    ]
    waiting = [
        scorers[number % workers].score.remote(index) for number, index in enumerate(indices)
    ]
    for reference in waiting:
        yield ray.get(reference)
