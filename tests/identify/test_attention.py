"""The rule as blocks, as a flex mask and as rows, against a plain mask."""

from __future__ import annotations

import pytest
import torch

from vllm_duo.identify.attention import (
    Softmax,
    StreamingRule,
    attention_rows,
    full_attention,
    streaming_attention,
)
from vllm_duo.identify.policies import ClassPolicy, GatedPolicy, LastRowsPolicy


def make_qkv(length, heads=4, kv_heads=2, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(2, count, length, size, generator=generator, dtype=dtype)
        for count in (heads, kv_heads, kv_heads)
    ]


@pytest.fixture(params=[None, [0.5, -2.0, 3.0, 1.0]], ids=["plain", "learned sinks"])
def softmax(request):
    """Of four query heads; keys that get most have logits of about 2."""
    sinks = request.param and torch.tensor(request.param, dtype=torch.float64)
    return Softmax(0.3, sinks)


def plain(query, key, value, softmax, sink, recent):
    """The rule as one mask over all scores; a learned sink is one more score, without a value."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    i = torch.arange(query.shape[2])[:, None]
    j = torch.arange(query.shape[2])[None]
    visible = (j <= i) & ((j < sink) | (j > i - recent))
    logits = (query @ key.mT * softmax.scaling).masked_fill(~visible, -torch.inf)
    if softmax.sinks is not None:
        sinks = softmax.sinks.to(logits.dtype)[:, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sinks], -1)
    return logits.softmax(-1)[..., : key.shape[2]] @ value


@pytest.mark.parametrize("length", [1, 19, 129, 300])
@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (4, 16), (130, 7), (3, 200)])
def test_blocks_follow_the_rule(length, sink, recent, softmax):
    query, key, value = make_qkv(length)
    found = streaming_attention(query, key, value, softmax, StreamingRule(sink, recent))
    torch.testing.assert_close(found, plain(query, key, value, softmax, sink, recent))


@pytest.mark.parametrize("asked", [1, 5, 140, 299])
@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (4, 16), (130, 7), (300, 1)])
def test_last_positions_are_those_of_all(asked, sink, recent, softmax):
    query, key, value = make_qkv(300)
    rule = StreamingRule(sink, recent)
    found = streaming_attention(query[:, :, -asked:], key, value, softmax, rule)
    expected = plain(query, key, value, softmax, sink, recent)
    torch.testing.assert_close(found, expected[:, :, -asked:])


def test_last_layer_computes_what_is_asked_for(softmax):
    query, key, value = make_qkv(60)
    seen = []

    def policy(layer, query, *others):
        seen.append((layer, query.shape[2]))
        return full_attention(query, *others)

    last_rows = LastRowsPolicy(policy, last=1, first=50)
    expected = full_attention(query, key, value, softmax)
    torch.testing.assert_close(last_rows(0, query, key, value, softmax), expected)
    found = last_rows(1, query, key, value, softmax)
    torch.testing.assert_close(found[:, :, 50:], expected[:, :, 50:])
    assert found.shape == expected.shape
    assert seen == [(0, 60), (1, 10)]


def test_flex_follows_the_rule(softmax):
    query, key, value = make_qkv(200, dtype=torch.float32)
    found = streaming_attention(query, key, value, softmax, StreamingRule(4, 16, "flex"))
    torch.testing.assert_close(
        found, plain(query, key, value, softmax, 4, 16), rtol=1e-4, atol=1e-5
    )


def test_flex_without_a_backward_pass_refuses(softmax):
    query, key, value = make_qkv(200, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="kernel sdpa"):
        streaming_attention(
            query.requires_grad_(), key, value, softmax, StreamingRule(4, 16, "flex")
        )


def test_full_attention_is_causal(softmax):
    query, key, value = make_qkv(50)
    torch.testing.assert_close(
        full_attention(query, key, value, softmax), plain(query, key, value, softmax, 50, 1)
    )


def test_classes_take_each_head_as_its_class_says(softmax):
    query, key, value = make_qkv(60)
    policy = ClassPolicy(torch.tensor([[True, False]]), StreamingRule(4, 16))
    found = policy(0, query, key, value, softmax)
    torch.testing.assert_close(found[:, :2], plain(query, key, value, softmax, 60, 1)[:, :2])
    torch.testing.assert_close(found[:, 2:], plain(query, key, value, softmax, 4, 16)[:, 2:])


def test_gates_mix_full_and_streaming(softmax):
    query, key, value = make_qkv(60)
    gates = torch.tensor([[0.25, 1.0]])
    found = GatedPolicy(gates, StreamingRule(4, 16))(0, query, key, value, softmax)
    full, near = (plain(query, key, value, softmax, *kept) for kept in ((60, 1), (4, 16)))
    torch.testing.assert_close(found[:, :2], 0.25 * full[:, :2] + 0.75 * near[:, :2])
    torch.testing.assert_close(found[:, 2:], full[:, 2:])


@pytest.mark.parametrize("rule", [None, StreamingRule(4, 16)])
def test_rows_are_the_weights_of_the_outputs(rule, softmax):
    query, key, value = make_qkv(60, dtype=torch.float32)
    rows = torch.tensor([0, 17, 59])
    weights = attention_rows(query[:1], key[:1], softmax, rows, rule)
    expected = plain(query, key, value, softmax, *((4, 16) if rule else (60, 1)))[0][:, rows]
    found = weights @ value[0].repeat_interleave(2, 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
