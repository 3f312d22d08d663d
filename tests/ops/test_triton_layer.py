"""A layer's whole step with the Triton kernels, and which launches it takes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.ops.flashinfer_stand_in import StandIn
from tests.ops.steps import clone, guards, make_step
from tests.ops.triton_cases import (
    implementation,  # noqa: F401
)
from vllm_duo.ops.batch import SnapshotCopy
from vllm_duo.ops.layer import triton as layer_kernel
from vllm_duo.ops.prefill import flash
from vllm_duo.ops.prefill.flashinfer import FlashInferPrefill
from vllm_duo.ops.write_kv import reference

MIXED = [True, False]


def spy(original, name, seen):
    def called(*args, **kwargs):
        seen.append(name)
        return original(*args, **kwargs)

    return called


@pytest.fixture
def launches(monkeypatch):
    """Names of the operators called, in order."""
    seen = []
    for name in (
        "write_kv",
        "write_retrieval",
        "write_streaming",
        "copy_snapshots",
        "decode",
        "prefill",
    ):
        monkeypatch.setattr(layer_kernel, name, spy(getattr(layer_kernel, name), name, seen))
    return seen


def serve(step, **kwargs):
    """Run the step; output and caches as they should be."""
    expected = clone(step.caches)
    reference.write_retrieval(step.k, step.v, step.heads, expected, step.batch)
    reference.write_streaming(step.k, step.v, step.heads, expected, step.batch)
    output = torch.full_like(step.q, torch.nan)
    args = (step.q, step.k, step.v, step.heads, step.caches, step.batch, step.scale)
    layer_kernel.attend_and_write(*args, output, sinks=step.sinks, **kwargs)
    step.assert_exact(output)
    for now, then in (
        (step.caches.retrieval, expected.retrieval),
        (step.caches.streaming, expected.streaming),
    ):
        if then is not None:
            assert torch.equal(now.nan_to_num(9.0), then.nan_to_num(9.0))


def test_triton_layer_writes_decodes_at_once(launches):
    serve(make_step(MIXED, [90, 130], [1, 1], seed=1))
    assert launches == ["copy_snapshots", "write_kv", "decode"]


def test_triton_layer_writes_drafts_at_once_within_the_ring_s_slack(launches):
    serve(make_step(MIXED, [130, 40], [4, 1], draft_size=3, recent_size=20, seed=2))
    assert launches == ["copy_snapshots", "write_kv", "decode"]


def test_triton_layer_writes_the_ring_last_where_it_overwrites_what_is_seen(launches):
    serve(make_step(MIXED, [130, 40], [5, 1], draft_size=3, recent_size=20, seed=3))
    assert launches == ["copy_snapshots", "write_retrieval", "decode", "write_streaming"]


def test_triton_layer_serves_decodes_beside_prefills(launches):
    serve(make_step(MIXED, [130, 40, 0], [1, 50, 20], num_decodes=1, seed=4))
    assert launches == [
        "copy_snapshots",
        "write_retrieval",
        "decode",
        "prefill",
        "write_streaming",
    ]


def test_triton_layer_with_learned_sinks(launches):
    serve(make_step(MIXED, [130, 40, 0], [1, 50, 20], num_decodes=1, seed=7, sinks="ordinary"))
    assert {"decode", "prefill"} <= set(launches)


def test_triton_layer_refuses_sinks_that_another_kernel_would_leave_out():
    step = make_step(MIXED, [20], [30], num_decodes=0, seed=8, sinks="ordinary")
    with pytest.raises(ValueError, match="leaves them out"):
        serve(step, retrieval_prefill=lambda *_: None)


def test_triton_layer_stores_the_state_before_it_is_overwritten():
    """A snapshot at the context's end, in a decode whose token overwrites its oldest slot."""
    step = make_step([False], [100], [1], head_size=16, sink_size=8, recent_size=32, seed=5)
    before = step.caches.streaming.clone()
    free = guards(step)[:5]
    copies = (SnapshotCopy(True, 0, 100, free),)
    ring = dataclasses.replace(step.store.ring, copies=copies)
    step.caches = dataclasses.replace(step.caches, ring=ring)
    output = torch.empty_like(step.q)
    args = (step.q, step.k, step.v, step.heads, step.caches, step.batch, step.scale)
    layer_kernel.attend_and_write(*args, output)
    own = step.store.ring.block_table[0].long()
    assert torch.equal(step.caches.streaming[free], before[own])
    assert not torch.equal(step.caches.streaming[own], before[own])


def varlen(calls):
    """The paged, causal part of FlashAttention's contract, in PyTorch."""

    def flash_attn_varlen_func(
        *,
        q,
        k,
        v,
        cu_seqlens_q,
        max_seqlen_q,
        seqused_k,
        max_seqlen_k,
        softmax_scale,
        causal,
        block_table,
        fa_version,
    ):
        assert causal
        assert k.stride(-1) == v.stride(-1) == q.stride(-1) == 1
        calls.append((max_seqlen_q, max_seqlen_k, fa_version))
        output = torch.empty_like(q)
        for row, length in enumerate(seqused_k.tolist()):
            low, high = cu_seqlens_q[row : row + 2].tolist()
            assert high - low <= max_seqlen_q
            assert length <= max_seqlen_k
            group = q.shape[1] // k.shape[2]
            pages = block_table[row].long()
            keys = k[pages].flatten(0, 1)[:length].repeat_interleave(group, 1)
            values = v[pages].flatten(0, 1)[:length].repeat_interleave(group, 1)
            logits = torch.einsum("qhd,khd->hqk", q[low:high].double(), keys.double())
            position = torch.arange(length - (high - low), length)[:, None]
            hidden = torch.arange(length) > position
            weights = (logits * softmax_scale).masked_fill(hidden, -torch.inf).softmax(-1)
            output[low:high] = torch.einsum("hqk,khd->qhd", weights, values.double()).to(q.dtype)
        return output

    return flash_attn_varlen_func


@pytest.mark.parametrize("mask", [[True, False, True], [True], [False]])
def test_triton_layer_leaves_the_retrieval_heads_to_flash_attention(mask, launches):
    """Against a stand-in that keeps the call's contract: views, head order, lengths, starts."""
    calls = []

    def kernel(*args):
        flash.retrieval_prefill(*args, flash_attn_varlen_func=varlen(calls), fa_version=3)

    step = make_step(mask, [70, 20, 0], [1, 15, 20], num_decodes=1, seed=6)
    serve(step, retrieval_prefill=kernel)
    assert calls == ([(20, 35, 3)] if any(mask) else [])


@pytest.mark.parametrize("mask", [[True, False, True], [True], [False]])
def test_triton_layer_leaves_the_retrieval_heads_to_flashinfer(mask, launches):
    """A decode beside two prefills: the chunks are in the cache when FlashInfer reads it."""
    made = []

    def make(*arguments):
        made.append(StandIn(*arguments))
        return made[-1]

    step = make_step(mask, [70, 20, 0], [1, 15, 20], num_decodes=1, seed=6)
    serve(step, retrieval_prefill=FlashInferPrefill(make))
    assert [plan[0] for wrapper in made for plan in wrapper.plans] == [[0, 15, 35]] * any(mask)
