"""Gates: the loss against a plain implementation, constructed heads, the schedule."""

from __future__ import annotations

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

from tests.identify import tiny
from tests.identify.conftest import make_job
from tests.identify.test_model import SIZES
from vllm_duo.identify.attention import StreamingRule
from vllm_duo.identify.gates import (
    GateState,
    gate_distance,
    gate_step,
    learning_rate_share,
    train_gates,
)
from vllm_duo.identify.samples import SampleMaker, to_batch


def plain_hidden(model, ids, gates, sink, recent):
    """Last hidden states of one sequence [T], head by head and query by query."""
    config, weights = model.config, model.model
    size, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def rotate(x):
        half = size // 2
        rotated = torch.empty_like(x)
        for position in range(len(x)):
            for pair in range(half):
                angle = torch.tensor(position * theta ** (-2 * pair / size), dtype=x.dtype)
                a, b = x[position, pair], x[position, pair + half]
                rotated[position, pair] = a * angle.cos() - b * angle.sin()
                rotated[position, pair + half] = b * angle.cos() + a * angle.sin()
        return rotated

    def attend(q, k, v, position, keys):
        scores = torch.stack([q[position] @ k[j] for j in keys]) / size**0.5
        return sum(p * v[j] for p, j in zip(scores.softmax(0), keys, strict=True))

    x = weights.embed_tokens.weight[ids]
    for number, layer in enumerate(weights.layers):
        attention = layer.self_attn
        normed = norm(x, layer.input_layernorm.weight)
        heads = []
        for head in range(config.num_attention_heads):
            own, shared = (slice(h * size, (h + 1) * size) for h in (head, head // group))
            q = rotate(normed @ attention.q_proj.weight[own].T)
            k = rotate(normed @ attention.k_proj.weight[shared].T)
            v = normed @ attention.v_proj.weight[shared].T
            alpha = gates[number, head // group]
            rows = []
            for i in range(len(ids)):
                near = [j for j in range(i + 1) if j < sink or j > i - recent]
                full = attend(q, k, v, i, range(i + 1))
                rows.append(alpha * full + (1 - alpha) * attend(q, k, v, i, near))
            heads.append(torch.stack(rows))
        x = x + torch.cat(heads, -1) @ attention.o_proj.weight.T
        normed = norm(x, layer.post_attention_layernorm.weight)
        mlp = layer.mlp
        gate = torch.nn.functional.silu(normed @ mlp.gate_proj.weight.T)
        x = x + gate * (normed @ mlp.up_proj.weight.T) @ mlp.down_proj.weight.T
    return norm(x, weights.norm.weight)


def test_loss_and_gradients_equal_a_plain_implementation():
    job = make_job(tiny.random_llama())
    ids = torch.randint(3, 600, (2, 14), generator=torch.Generator().manual_seed(1))
    answers = torch.zeros(2, 14, dtype=torch.bool)
    answers[0, 10:13] = answers[1, 12] = True
    rule = StreamingRule(2, 5)
    start = torch.tensor([[0.9, 0.2], [0.5, 0.7]])

    gates = start.clone().requires_grad_()
    found = gate_distance(job.model, ids, answers, gates, rule)
    found.backward()

    plain_gates = start.clone().requires_grad_()
    model = job.model.model
    differences = []
    for row in range(2):
        wanted = plain_hidden(model, ids[row], torch.ones(2, 2), 2, 5)
        hidden = plain_hidden(model, ids[row], plain_gates, 2, 5)
        differences.append((hidden - wanted)[answers[row]])
    expected = torch.cat(differences).square().mean()
    expected.backward()

    assert expected > 0.01
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    torch.testing.assert_close(gates.grad, plain_gates.grad, rtol=1e-4, atol=1e-5)


def test_checkpointed_layers_give_the_same_gradients():
    job = make_job(tiny.random_llama())
    ids, answers = to_batch([job.samples().make("identify", n) for n in range(2)])
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            job.model.checkpoint_layers()
        state = GateState.start(job)
        gate_step(job, state, ids, answers, job.rule, 0)
        gradients.append(state.gates.grad)
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(*gradients)


def test_layers_are_computed_again_in_the_backward_pass():
    job = make_job(tiny.random_llama(), steps=1)
    calls = []
    for layer in job.model.model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: calls.append(module))
    train_gates(job, None, lambda arrays: None, lambda *args: None)
    # Two layers: once in the full pass, once in the gated one, once more in its backward pass.
    assert len(calls) == 6


def test_every_step_has_its_own_samples(monkeypatch):
    made = []
    real = SampleMaker.make
    monkeypatch.setattr(
        SampleMaker, "make", lambda self, *which: made.append(which) or real(self, *which)
    )
    job = make_job(tiny.random_llama(), steps=3, batch_size=2)
    train_gates(job, None, lambda arrays: None, lambda *args: None)
    assert made == [("identify", number) for number in range(6)]


def test_dropout_stays_off():
    torch.manual_seed(0)
    config = Phi3Config(**SIZES, resid_pdrop=0.5, attention_dropout=0.5)
    job = make_job(Phi3ForCausalLM(config).float().eval())
    job.model.checkpoint_layers()
    ids, answers = to_batch([job.samples().make("identify", 0)])
    gates = torch.full((2, 2), 0.5)
    losses = {float(gate_distance(job.model, ids, answers, gates, job.rule)) for _ in range(2)}
    assert len(losses) == 1
    assert losses != {0.0}


def test_padding_does_not_change_the_distance():
    job = make_job(tiny.random_llama())
    ids, answers = to_batch([job.samples().make("identify", 0)])
    padded = (
        torch.nn.functional.pad(ids, (0, 9), value=77),
        torch.nn.functional.pad(answers, (0, 9)),
    )
    gates = torch.full((2, 2), 0.5)
    one, two = (
        gate_distance(job.model, *batch, gates, job.rule) for batch in ((ids, answers), padded)
    )
    torch.testing.assert_close(one, two)


def test_needed_head_stays_and_useless_head_goes():
    job = make_job(tiny.copying_llama(), steps=80, lr=0.05)
    scores = train_gates(job, None, lambda arrays: None, lambda *args: None)
    assert scores.values[0, 0] > 0.9
    assert 0.0 <= scores.values[0, 1] < 0.01


def test_gates_stay_between_0_and_1():
    job = make_job(tiny.random_llama(), steps=5, lr=1.0)
    values = train_gates(job, None, lambda arrays: None, lambda *args: None).values
    assert 0.0 <= values.min() <= values.max() <= 1.0


def test_weights_are_not_trained():
    model = tiny.random_llama()
    before = {name: value.clone() for name, value in model.named_parameters()}
    train_gates(make_job(model, steps=2), None, lambda arrays: None, lambda *args: None)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_learning_rate_rises_and_falls_as_published():
    shares = [learning_rate_share(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == pytest.approx(0.5)
    assert set(shares[19:81]) == {1.0}
    assert shares[-1] == pytest.approx(0.1)
