"""Models with learned sinks (gpt-oss): every part of the identification computes them."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from tests.identify import tiny
from tests.identify.conftest import make_job
from tests.models.quantised import quantise
from tests.oracle import Oracle
from vllm_duo.identify.attention import StreamingRule
from vllm_duo.identify.gates import gate_distance
from vllm_duo.identify.memory import step_bytes, weight_files
from vllm_duo.identify.model import hook_model, load_model
from vllm_duo.identify.mxfp4 import plain_numbers
from vllm_duo.identify.policies import ClassPolicy, full_policy

CPU = torch.device("cpu")
WINDOWS = (20, None, 20)


def hooked(model):
    return hook_model(model, tiny.tokenizer(), "gpt-oss", CPU)


@pytest.mark.parametrize("window", [1, 8, 20])
@torch.no_grad()
def test_with_every_head_full_the_logits_are_transformers_own(window):
    """Over a text longer than the window; float32 twice, sums in another order."""
    ids = torch.randint(3, 600, (2, 90), generator=torch.Generator().manual_seed(window))
    model = hooked(tiny.sliding_gpt_oss(window))
    found = model.logits(model.hidden(ids, full_policy))
    expected = tiny.sliding_gpt_oss(window)(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert model.info.learned_sinks
    assert model.info.windows == (window, None, window)
    for layer in (0, 1):  # one that slides and one that does not
        other = tiny.sliding_gpt_oss(window)
        attention = other.model.layers[layer].self_attn
        attention.sinks.copy_(attention.sinks.roll(1))
        assert (other(ids, use_cache=False).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("streaming", [[0], [1], [0, 1]])
@torch.no_grad()
def test_classes_are_the_oracles(streaming, tmp_path):
    """The oracle of the served tokens, which shares no code with the identification."""
    folder = tiny.save(tiny.sliding_gpt_oss(20), tmp_path / "model")
    retrieval = torch.ones(3, 2, dtype=torch.bool)
    retrieval[1, streaming] = False
    ids = torch.randint(3, 600, (1, 90), generator=torch.Generator().manual_seed(1))
    model = hooked(tiny.sliding_gpt_oss(20))
    rule = StreamingRule(tiny.SINK, tiny.RECENT)
    found = model.logits(model.hidden(ids, ClassPolicy(retrieval, rule)))[0].log_softmax(-1)
    oracle = Oracle(folder, retrieval.numpy(), tiny.SINK, tiny.RECENT, windows=WINDOWS)
    torch.testing.assert_close(found, oracle.logprobs(ids[0].tolist()), rtol=1e-3, atol=1e-3)
    full = model.logits(model.hidden(ids, full_policy))[0].log_softmax(-1)
    assert (full - found).abs().max() > 0.1, "what streams must matter"


def gated(gates, sink, recent):
    """An attention function of transformers: the gates of layer 1, written with masks."""

    def masked(module, query, key, value, scaling, visible):
        logits = (query @ key.mT * scaling).masked_fill(~visible, -torch.inf)
        sinks = module.sinks[:, None, None].expand(*logits.shape[:3], 1)
        return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1] @ value

    def attend(module, query, key, value, mask, scaling, **more):
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        i, j = torch.arange(query.shape[2])[:, None], torch.arange(query.shape[2])[None]
        inputs = (module, query, key, value, scaling)
        if module.sliding_window:
            output = masked(*inputs, (j <= i) & (j > i - module.sliding_window))
        else:
            alpha = gates[module.layer_idx].repeat_interleave(2)[:, None, None]
            near = masked(*inputs, (j <= i) & ((j < sink) | (j > i - recent)))
            output = alpha * masked(*inputs, j <= i) + (1 - alpha) * near
        return output.transpose(1, 2).contiguous(), None

    return attend


def test_loss_and_gradients_of_gates_equal_a_plain_implementation():
    job = make_job(tiny.sliding_gpt_oss(20))
    ids = torch.randint(3, 600, (2, 60), generator=torch.Generator().manual_seed(1))
    answers = torch.zeros(2, 60, dtype=torch.bool)
    answers[0, 50:53] = answers[1, 57] = True
    start = torch.tensor([[0.0, 0.0], [0.4, 0.7], [0.0, 0.0]])

    gates = start.clone().requires_grad_()
    found = gate_distance(job.model, ids, answers, gates, job.rule)
    found.backward()

    plain_gates = start.clone().requires_grad_()
    model = tiny.sliding_gpt_oss(20).requires_grad_(False)
    states = []
    for each in (torch.ones(3, 2), plain_gates):
        AttentionInterface.register("tests_gated", gated(each, tiny.SINK, tiny.RECENT))
        model.set_attn_implementation("tests_gated")
        states.append(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[answers])
    expected = (states[1] - states[0]).square().mean()
    expected.backward()

    assert expected > 1e-3
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-3)
    assert gates.grad[1].abs().min() > 1e-4
    torch.testing.assert_close(gates.grad, plain_gates.grad, rtol=1e-3, atol=1e-5)
    assert (gates.grad[[0, 2]] == 0).all(), "layers that slide have nothing to choose"


def test_a_step_is_estimated_to_need_more():
    """Queries and outputs of both attentions once more: 4 * 32 numbers of 4 bytes a token."""
    model = hooked(tiny.sliding_gpt_oss(20))
    assert model.info.num_heads * model.info.head_size == 32
    with_sinks = step_bytes(model, 10, 1, gradients=False)
    object.__setattr__(model.info, "learned_sinks", False)
    assert with_sinks - step_bytes(model, 10, 1, gradients=False) == 10 * 4 * 32 * 4


@pytest.fixture(scope="module")
def in_mxfp4(tmp_path_factory):
    """A checkpoint as gpt-oss is published, and the values that it stands for in float32."""
    folder = tmp_path_factory.mktemp("mxfp4")
    whole = tiny.save(tiny.sliding_gpt_oss(20, intermediate_size=64), folder / "whole")
    packed, plain = quantise(whole, folder, "mxfp4")
    tiny.tokenizer().save_pretrained(packed)
    return packed, plain


@torch.no_grad()
def test_weights_in_mxfp4_are_made_plain(in_mxfp4):
    """Every value that they stand for is one of bfloat16's, so nothing is rounded."""
    packed, plain = in_mxfp4
    model = load_model(str(packed), device="cpu", dtype=None)
    ids = torch.randint(3, 600, (1, 60), generator=torch.Generator().manual_seed(1))
    found = model.logits(model.hidden(ids, full_policy))
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    weights = list(model.model.parameters())
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert plain_numbers(weight_files(packed)) == sum(weight.numel() for weight in weights)


def test_weights_in_mxfp4_that_do_not_fit_once_they_are_plain(in_mxfp4, monkeypatch):
    packed, _ = in_mxfp4
    needs = 4 * plain_numbers(weight_files(packed))
    assert (packed / "model.safetensors").stat().st_size < 0.9 * needs
    monkeypatch.setattr("vllm_duo.identify.memory.available_cpu_bytes", lambda: needs - 1)
    with pytest.raises(MemoryError, match=r"its weights need about .* in float32"):
        load_model(str(packed), device="cpu", dtype=None)
