"""The Triton kernels on a GPU: what the interpreter cannot show. Skipped where there is none."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.ops.oracle import SINKS
from tests.ops.steps import clone, make_step, on_device
from vllm_duo.ops.batch import Batch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def implementation():
    return "triton"


def serve(step, output):
    from vllm_duo.ops.layer.triton import attend_and_write

    attend_and_write(
        step.q,
        step.k,
        step.v,
        step.heads,
        step.caches,
        step.batch,
        step.scale,
        output,
        sinks=step.sinks,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_layer_on_the_device(group, head_size, dtype):
    step = make_step(
        [True, False, False],
        [900, 3, 70, 0],
        [1, 1, 200, 33],
        num_decodes=2,
        group=group,
        head_size=head_size,
        dtype=dtype,
    )
    step = on_device(step, "cuda")
    output = torch.full_like(step.q, torch.nan)
    serve(step, output)
    step.assert_exact(output)


@pytest.mark.parametrize("kind", SINKS)
def test_layer_with_learned_sinks_on_the_device(kind):
    step = make_step([True, False], [5000, 70, 40], [1, 200, 1], num_decodes=1, group=8, sinks=kind)
    step = on_device(step, "cuda")
    output = torch.full_like(step.q, torch.nan)
    serve(step, output)
    step.assert_exact(output)


def test_decode_in_a_graph_is_replayed_over_other_requests():
    """Captured with one batch and its padding, replayed with other lengths, without a host look."""
    steps = [
        on_device(
            make_step([True, False], contexts, chunks, head_size=128, seed=1, padding=0), "cuda"
        )
        for contexts, chunks in (([700, 40], [1, 1]), ([20, 650], [1, 1]))
    ]
    held, other = steps
    output = torch.full_like(held.q, torch.nan)
    serve(dataclasses.replace(held, caches=clone(held.caches)), output)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        serve(held, output)
    for name in ("q", "k", "v"):
        getattr(held, name).copy_(getattr(other, name))
    held.batch.seq_lens.copy_(other.batch.seq_lens)
    for name in ("retrieval", "streaming"):
        getattr(held.caches, name).copy_(getattr(other.caches, name))
    held.caches.paged.block_table.copy_(other.caches.paged.block_table)
    held.caches.ring.block_table.copy_(other.caches.ring.block_table)
    graph.replay()
    torch.cuda.synchronize()
    other.assert_exact(output)


def test_a_step_never_waits_for_the_device():
    step = make_step([True, False], [300, 20, 50], [1, 1, 90], num_decodes=2)
    step = on_device(step, "cuda")
    output = torch.empty_like(step.q)
    serve(step, output)
    torch.cuda.synchronize()
    batch = step.batch
    fresh = Batch(
        batch.query_start_loc,
        batch.seq_lens,
        batch.num_decodes,
        batch.host_query_start_loc,
        batch.host_seq_lens,
    )
    output.fill_(torch.nan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        serve(dataclasses.replace(step, batch=fresh), output)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    step.assert_exact(output)


def test_flash_attention_serves_the_retrieval_heads():
    from functools import partial

    from vllm_duo.attention.retrieval_prefill import find_flash_attn
    from vllm_duo.ops.layer.triton import attend_and_write
    from vllm_duo.ops.prefill.flash import retrieval_prefill

    step = make_step(
        [True, False, True],
        [500, 40, 0],
        [1, 200, 30],
        num_decodes=1,
        head_size=128,
        dtype=torch.bfloat16,
    )
    step = on_device(step, "cuda")
    function, version = find_flash_attn(128)
    kernel = partial(retrieval_prefill, flash_attn_varlen_func=function, fa_version=version)
    output = torch.full_like(step.q, torch.nan)
    args = (step.q, step.k, step.v, step.heads, step.caches, step.batch, step.scale)
    attend_and_write(*args, output, kernel)
    step.assert_exact(output)
