"""A layer's set-up for a GPU, with tensors on PyTorch's device without memory in the GPU's place."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.attention.test_backend import Config
from vllm_duo.attention import impl, retrieval_prefill, specs
from vllm_duo.attention.head_buffers import HeadBuffers
from vllm_duo.config import DuoConfig, resolve
from vllm_duo.heads import HeadPattern
from vllm_duo.ops.batch import HeadMap, LayerCaches
from vllm_duo.ops.gpu import class_arguments
from vllm_duo.ops.prefill.flashinfer import FlashInferPrefill
from vllm_duo.server_plan import ServerPlan

MASK = np.array([True, False, False, True])


class Layer(torch.nn.Module):
    """Stands for vLLM's ``Attention``."""

    head_size = head_size_v = 64
    kv_cache_torch_dtype, kv_cache_dtype = torch.bfloat16, "auto"
    attn_backend = None


class Wrapper:
    """Stands for FlashInfer's, and keeps what it is told."""

    def __init__(self, workspace, layout):
        self.device = workspace.device

    def plan(self, **arguments):
        self.planned = arguments


@pytest.fixture
def make_layer(monkeypatch):
    """Makes a layer with two retrieval and two streaming heads, by the arguments of its impl."""
    pattern = HeadPattern(np.array([[0.9, 0.0, 0.1, 1.0]]))
    layer = Layer()
    config = Config(
        speculative_config=None,
        device_config=SimpleNamespace(device_type="meta"),
        cache_config=SimpleNamespace(block_size=16, cache_dtype="auto"),
        compilation_config=SimpleNamespace(static_forward_context={"model.layers.0.attn": layer}),
        model_config=SimpleNamespace(),
    )
    monkeypatch.setattr(impl, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(impl, "Attention", Layer)
    monkeypatch.setattr(impl.DuoAttentionImpl, "_check_window", lambda *_: None)
    monkeypatch.setattr(retrieval_prefill, "find_flashinfer", lambda: (Wrapper, "0.7.0.post1"))

    def make(setting, **arguments):
        duo = DuoConfig(retrieval_prefill=setting, untested_gpu=True)
        plan = ServerPlan(pattern, resolve(duo, pattern))
        monkeypatch.setattr(specs, "resolve_plan", lambda _: plan)
        layer.impl = impl.DuoAttentionImpl(16, 64, 0.125, 4, **arguments)
        layer.impl.process_weights_after_loading(torch.bfloat16)
        return layer

    retrieval_prefill.server_choice.cache_clear()
    yield make
    retrieval_prefill.server_choice.cache_clear()


@pytest.fixture
def layer(make_layer):
    return make_layer("flashinfer")


def test_kernel_is_ready_when_the_weights_have_loaded(layer):
    kernel = layer.impl.retrieval_prefill
    assert isinstance(kernel, FlashInferPrefill)
    (planned,) = kernel._planned.values()
    plan = planned.wrapper.planned
    assert (plan["num_qo_heads"], plan["num_kv_heads"], plan["sm_scale"]) == (8, 2, 0.125)
    assert planned.wrapper.device == plan["paged_kv_indices"].device == torch.device("meta")


def test_head_map_is_among_the_model_s_buffers(layer):
    """Those vLLM saves and restores at sleep level 2; all else that loading has allocated is lost."""
    heads = layer.impl.heads
    buffers = dict(layer.named_buffers())
    int32 = [argument.heads for argument in class_arguments(heads, LayerCaches(), heads.retrieval)]
    for tensor in (heads.retrieval, heads.streaming, *int32):
        assert any(tensor is buffer for buffer in buffers.values())
    assert layer.state_dict() == {}, "no checkpoint has them"


def test_head_map_survives_sleep():
    """As vLLM's worker does it: contents saved, memory lost, contents copied back into place."""
    heads = HeadMap.from_mask(MASK, torch.device("cpu"))
    model = torch.nn.Sequential(HeadBuffers(heads))
    before = [argument.heads for argument in class_arguments(heads, LayerCaches(), heads.retrieval)]
    saved = {name: buffer.cpu().clone() for name, buffer in model.named_buffers()}
    for buffer in model.buffers():
        buffer.fill_(-1)
    for name, buffer in model.named_buffers():
        buffer.data.copy_(saved[name].data)
    after = [argument.heads for argument in class_arguments(heads, LayerCaches(), heads.retrieval)]
    assert [each.tolist() for each in after] == [[0, 3], [1, 2]]
    assert heads.retrieval.tolist() == [0, 3]
    assert heads.streaming.tolist() == [1, 2]
    assert [a is b for a, b in zip(before, after, strict=True)] == [True, True]


class TestLearnedSinks:
    def test_they_are_among_the_model_s_buffers(self, make_layer):
        """As the lists of heads are; graphs read them where they lie."""
        layer = make_layer("auto", sinks=torch.zeros(16, dtype=torch.bfloat16, device="meta"))
        sinks = layer.impl.sinks
        assert sinks.dtype == torch.float32
        assert layer.duo_sinks is sinks
        assert layer.state_dict() == {}, "the checkpoint has them under the model's own name"
        layer.impl.process_weights_after_loading(torch.bfloat16)
        assert layer.impl.sinks is sinks is layer.duo_sinks

    def test_triton_serves_their_prefills(self, make_layer):
        sinks = torch.zeros(16, device="meta")
        assert make_layer("auto", sinks=sinks).impl.retrieval_prefill is None

    def test_another_kernel_is_refused(self, make_layer):
        with pytest.raises(NotImplementedError, match="learned sinks out"):
            make_layer("flashinfer", sinks=torch.zeros(16, device="meta"))
