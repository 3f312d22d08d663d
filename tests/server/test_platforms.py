"""Platforms, executors and pipelines that are refused, and those that are not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import vllm.platforms

from tests.server.configs import reasons_of
from vllm_duo import support


@pytest.fixture
def executor_reasons(monkeypatch):
    """What is refused of vLLM's parallel settings, on a platform that runs Ray."""

    def reasons(ray_device_key="GPU", **settings):
        platform = SimpleNamespace(device_name="stand-in", ray_device_key=ray_device_key)
        monkeypatch.setattr(vllm.platforms, "current_platform", platform, raising=False)
        defaults = {"distributed_executor_backend": "mp", "data_parallel_backend": "mp"}
        sizes = {"data_parallel_size": 1, "world_size": 2}
        parallel = SimpleNamespace(**(defaults | sizes | settings))
        return list(support.executor_refusals(parallel))

    return reasons


def test_ray_where_vllm_runs_it(executor_reasons):
    assert executor_reasons(distributed_executor_backend="ray") == []


def test_ray_where_vllm_does_not(executor_reasons):
    (reason,) = executor_reasons("", distributed_executor_backend="ray", world_size=1)
    assert reason.endswith("vLLM does not run Ray on the platform stand-in, use mp")


@pytest.mark.refused("Ray executor and data parallelism together")
def test_ray_and_replicas(executor_reasons):
    (reason,) = executor_reasons(distributed_executor_backend="ray", data_parallel_size=2)
    assert "ray with --data-parallel-size 2: not tested yet" in reason


@pytest.mark.refused("data parallelism over Ray")
def test_replicas_over_ray(executor_reasons):
    (reason,) = executor_reasons(data_parallel_backend="ray", data_parallel_size=2)
    assert reason == "--data-parallel-backend ray: not tested yet, use mp"


def test_other_executors(executor_reasons):
    (reason,) = executor_reasons(distributed_executor_backend="external_launcher")
    assert reason == "--distributed-executor-backend external_launcher: not tested yet, use mp"


@pytest.mark.parametrize("is_cpu", [True, False])
def test_pipelines_are_refused_on_cpus_alone(monkeypatch, is_cpu):
    platform = SimpleNamespace(is_cpu=lambda: is_cpu)
    monkeypatch.setattr(vllm.platforms, "current_platform", platform, raising=False)
    assert bool(support.pipeline_refusal(2)) is is_cpu
    assert support.pipeline_refusal(1) is None


@pytest.mark.refused("other platforms")
def test_other_platform(platform):
    platform("rocm")
    (reason,) = support.platform_refusals({"duo": {"untested_gpu": True}})
    assert reason == "the platform rocm: vllm-duo has kernels for CPUs and for NVIDIA GPUs"


@pytest.mark.refused("NVIDIA GPUs")
@pytest.mark.parametrize("settings", [None, {}, {"duo": {"untested_gpu": False}}])
def test_gpu_is_untested(platform, settings):
    platform("cuda")
    (reason,) = support.platform_refusals(settings)
    assert "never on a GPU" in reason
    assert '"untested_gpu": true' in reason


def test_gpu_may_be_tried(platform):
    platform("cuda")
    assert list(support.platform_refusals({"duo": {"untested_gpu": True}})) == []


def test_kernel_of_a_gpu_on_a_cpu(serve):
    (reason,) = reasons_of(serve, duo={"retrieval_prefill": "flash-attn"})
    assert reason.startswith("\"retrieval_prefill\": 'flash-attn': it chooses a GPU's kernel")
