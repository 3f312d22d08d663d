"""Tensor parallelism over Ray: two nodes on this machine, the tokens of one rank."""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
import time

import openai
import psutil
import pytest

pytest.importorskip("ray")

import ray
from vllm import envs
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

from tests.e2e.needle import FLAGS, MODEL, client_of, greedy_ids, prompts
from tests.e2e.ray_cluster import ADDRESSES, server_env, two_nodes, write_absence, write_platform
from tests.e2e.test_tensor_parallel import MASKS, run
from tests.this_process import this_process  # noqa: F401 - a fixture
from vllm_duo.compat import ray_nodes
from vllm_duo.evaluate.server import ServerProcess

pytestmark = pytest.mark.engine

SECONDS = 180
"""In which a client must have its error and the server its end."""


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    return write_platform(tmp_path_factory.mktemp("platform") / "site")


@pytest.fixture(scope="module")
def cluster(platform):
    """Both nodes have everything."""
    with two_nodes(platform) as nodes:
        yield nodes


@pytest.fixture
def connect(monkeypatch):
    """Makes this process a driver of a cluster, on the first node."""
    envs.disable_envs_cache()  # an engine in this process has enabled it
    monkeypatch.setattr(type(current_platform), "ray_device_key", "GPU")
    monkeypatch.setenv("VLLM_HOST_IP", ADDRESSES[0])
    yield lambda nodes: ray.init(address=nodes.address, log_to_driver=False)
    ray.shutdown()


def without_plugin(platform, folder):
    """Environment of a node whose Python finds no vllm_duo."""
    return {"PYTHONPATH": f"{write_absence(folder)}{os.pathsep}{platform}"}


class TestNodes:
    """The check before workers start, without the workers."""

    @pytest.fixture(scope="class")
    def config(self):
        return EngineArgs(
            model=str(MODEL), dtype="float32", tensor_parallel_size=2, attention_backend="duo"
        ).create_engine_config()

    def test_a_node_without_the_plugin_is_named(
        self, platform, tmp_path, config, connect, monkeypatch
    ):
        with two_nodes(platform, without_plugin(platform, tmp_path / "absence")) as nodes:
            connect(nodes)
            group = ray.util.placement_group([{"GPU": 1}] * 2, strategy="STRICT_SPREAD")
            ray.get(group.ready(), timeout=SECONDS)
            monkeypatch.setattr(config.parallel_config, "placement_group", group)
            with pytest.raises(RuntimeError, match="not ready on every node") as caught:
                ray_nodes.check_nodes(config, {}, overwrites=False)
            ray.shutdown()
        (line,) = str(caught.value).splitlines()[1:]
        assert line.startswith(f"  - node {ADDRESSES[1]} (")
        assert "cannot be imported (No module named 'vllm_duo')" in line
        assert "install vllm-duo==" in line


@pytest.mark.slow
class TestEngines:
    """An engine in this process, its workers on both nodes."""

    @pytest.mark.feature("tensor parallelism over Ray")
    @pytest.mark.parametrize("executor", ["RayExecutorV2", "RayDistributedExecutor"])
    def test_tokens_are_the_oracles(
        self, executor, cluster, connect, checkpoint, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", str(int("V2" in executor)))
        monkeypatch.setenv("VLLM_USE_RAY_WRAPPED_PP_COMM", "0")  # it is for CUDA alone
        asked = []
        ask_nodes = ray_nodes.ask_nodes

        def noting(group, question, runtime_env):
            answers = ask_nodes(group, question, runtime_env)
            asked.append((question["overwrites"], set(answers)))
            return answers

        monkeypatch.setattr(ray_nodes, "ask_nodes", noting)
        connect(cluster)
        run(checkpoint, tmp_path, MASKS["crossed"], distributed_executor_backend="ray")
        assert asked == [("V2" not in executor, set(ADDRESSES))]

    @pytest.mark.parametrize("executor", ["RayExecutorV2", "RayDistributedExecutor"])
    def test_a_node_where_it_is_switched_off_stops_the_start(
        self, executor, platform, connect, checkpoint, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", str(int("V2" in executor)))
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        with two_nodes(platform, {"VLLM_PLUGINS": "duo_test_ray_platform"}) as nodes:
            connect(nodes)
            told = error_of_start(checkpoint, tmp_path)
            ray.shutdown()
        (line,) = told.splitlines()[1:]
        assert line.startswith(f"  - node {ADDRESSES[1]} (")
        assert "leaves vllm-duo out: add duo to it" in line
        assert not workers()

    def test_its_caches_tell_a_worker_without_the_plugin(
        self, platform, connect, checkpoint, tmp_path, monkeypatch
    ):
        """Should the nodes' check ever miss one."""
        monkeypatch.setattr(ray_nodes, "check_nodes", lambda *_, **__: None)
        with two_nodes(platform, without_plugin(platform, tmp_path / "absence")) as nodes:
            connect(nodes)
            told = error_of_start(checkpoint, tmp_path)
            ray.shutdown()
        assert "expected duo's caches in every worker" in told
        told = re.findall(r"^  - (.*)$", told, flags=re.MULTILINE)
        assert len(told) == 1
        assert told[0].startswith("worker 1 on ")


@pytest.mark.slow
class TestServers:
    def test_a_killed_worker_ends_the_server_and_the_next_one_serves(
        self, cluster, platform, tmp_path
    ):
        asked = prompts(256, 2)
        with serve(cluster, platform, tmp_path / "first") as server:
            server.wait_until_ready(timeout_s=2 * SECONDS)
            expected = greedy_ids(server, asked, max_tokens=16)
            request = Request(server, asked[0])
            start = time.monotonic()
            os.kill(workers()[-1].pid, signal.SIGKILL)
            error = request.error()
            log = ended_log(server)
            assert time.monotonic() - start < SECONDS
        assert isinstance(error, openai.OpenAIError)
        assert "died unexpectedly" in log
        assert not workers()
        with serve(cluster, platform, tmp_path / "second") as server:
            server.wait_until_ready(timeout_s=2 * SECONDS)
            assert greedy_ids(server, asked, max_tokens=16) == expected

    def test_a_node_without_the_plugin_stops_the_start(self, platform, tmp_path):
        with (
            two_nodes(platform, without_plugin(platform, tmp_path / "absence")) as nodes,
            serve(nodes, platform, tmp_path / "log") as server,
        ):
            log = ended_log(server)
        assert f"node {ADDRESSES[1]} (" in log
        assert "vllm-duo cannot be imported (No module named 'vllm_duo')" in log
        assert f"node {ADDRESSES[0]} (" not in log
        assert "Loading weights took" not in log


def error_of_start(checkpoint, tmp_path):
    """What an engine says that does not start."""
    told = None
    try:
        run(checkpoint, tmp_path, MASKS["crossed"], distributed_executor_backend="ray")
    except RuntimeError as error:
        told = str(error)
    # vLLM leaves it to the end of the process, where it would start another Ray to end its workers.
    for left in gc.get_objects():
        if type(left) is RayExecutorV2:
            left.shutdown()
    assert told is not None, "it started"
    return told


def serve(nodes, platform, log):
    flags = [*FLAGS, "--enforce-eager", "--attention-backend", "duo"]
    flags += ["--tensor-parallel-size", "2", "--distributed-executor-backend", "ray"]
    env = server_env(platform) | {"RAY_ADDRESS": nodes.address}
    return ServerProcess(MODEL, flags, log=log, env=env)


def ended_log(server):
    """The log of a server that ends by itself; vLLM's exit code is 0 where its engine has died."""
    server.process.wait(SECONDS)
    return server.log.read_text(errors="replace")


class Request:
    """A long streamed answer that has begun."""

    def __init__(self, server, prompt):
        self.client, self.prompt = client_of(server), prompt
        self.begun, self.outcome = threading.Event(), None
        self.thread = threading.Thread(target=self.ask, daemon=True)
        self.thread.start()
        assert self.begun.wait(SECONDS)

    def ask(self):
        try:
            for _ in self.client.completions.create(
                model="needle",
                prompt=self.prompt.text,
                max_tokens=3500,
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                self.begun.set()
        except Exception as error:
            self.outcome = error

    def error(self):
        """What the client is told; None: that its answer is whole."""
        self.thread.join(SECONDS)
        assert not self.thread.is_alive(), "the client hangs"
        return self.outcome


def workers():
    """vLLM's Ray workers on this machine."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if " ".join(process.info["cmdline"] or ()).startswith("ray::RayWorker"):
            found.append(process)
    return found
