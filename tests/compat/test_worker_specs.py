"""Workers without the plugin are noticed when they report their caches."""

from __future__ import annotations

from types import SimpleNamespace

import cloudpickle
import pytest
import torch
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_duo.compat import worker_specs
from vllm_duo.kv_cache.spec import RetrievalSpec
from vllm_duo.plugin import register

SHAPE = {"block_size": 16, "num_kv_heads": 2, "head_size": 16, "dtype": torch.float32}
OURS = {"layers.0.attn": RetrievalSpec(**SHAPE)}
STOCK = {"layers.0.attn": FullAttentionSpec(**SHAPE)}


class Executor:
    """Stands in for vLLM's, over workers that are in this process."""

    def __init__(self, specs, backend=AttentionBackendEnum.CUSTOM):
        self.vllm_config = SimpleNamespace(attention_config=SimpleNamespace(backend=backend))
        self.specs = specs

    def get_kv_cache_specs(self):
        return self.specs

    def collective_rpc(self, method):
        return [cloudpickle.loads(cloudpickle.dumps(method))(None) for _ in self.specs]


@pytest.fixture
def executor():
    """Makes a patched one."""
    register()
    patched = type("Patched", (Executor,), {})
    worker_specs.patch(SimpleNamespace(Executor=patched))
    return patched


def test_workers_with_our_caches_pass(executor):
    assert executor([OURS, OURS, {}]).get_kv_cache_specs() == [OURS, OURS, {}]


def test_a_worker_with_vllms_own_is_named(executor):
    with pytest.raises(RuntimeError, match="expected duo's caches in every worker") as caught:
        executor([OURS, STOCK]).get_kv_cache_specs()
    (line,) = [line for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert line.startswith("  - worker 1 on ")
    assert line.endswith(": FullAttentionSpec")
    assert "process" in line


def test_all_of_them_are_noticed(executor):
    with pytest.raises(RuntimeError, match=r"(?s)worker 0 on .*worker 1 on "):
        executor([STOCK, STOCK]).get_kv_cache_specs()


def test_other_servers_keep_what_they_have(executor):
    other = executor([STOCK], AttentionBackendEnum.CPU_ATTN)
    assert other.get_kv_cache_specs() == [STOCK]
