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


def serve_elsewhere(step, kernel):
    """The step with another library's kernel for the prefills' retrieval heads."""
    from vllm_duo.ops.layer.triton import attend_and_write

    output = torch.full_like(step.q, torch.nan)
    args = (step.q, step.k, step.v, step.heads, step.caches, step.batch, step.scale)
    attend_and_write(*args, output, kernel)
    return output


def mixed_step(head_size=128, dtype=torch.bfloat16, **sizes):
    """A decode and two prefills, one of them without a context."""
    step = make_step(
        [True, False, True],
        [500, 40, 0],
        [1, 200, 30],
        num_decodes=1,
        head_size=head_size,
        dtype=dtype,
        **sizes,
    )
    return on_device(step, "cuda")


def test_flash_attention_serves_the_retrieval_heads():
    from functools import partial

    from vllm_duo.attention.retrieval_prefill import find_flash_attn
    from vllm_duo.ops.prefill.flash import retrieval_prefill

    function, version = find_flash_attn(128)
    kernel = partial(retrieval_prefill, flash_attn_varlen_func=function, fa_version=version)
    step = mixed_step()
    step.assert_exact(serve_elsewhere(step, kernel))


@pytest.fixture(scope="module")
def flashinfer():
    """FlashInfer's kernel; one for all tests, as in a server."""
    from vllm_duo.attention.retrieval_prefill import find_flashinfer
    from vllm_duo.ops.prefill.flashinfer import FlashInferPrefill

    try:
        make_wrapper, _ = find_flashinfer()
    except ImportError as error:
        pytest.skip(str(error))
    return FlashInferPrefill(make_wrapper)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_size", "block_size"), [(64, 16), (128, 32), (256, 64)])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_flashinfer_serves_the_retrieval_heads(flashinfer, group, head_size, block_size, dtype):
    step = mixed_step(head_size, dtype, block_size=block_size, group=group)
    step.assert_exact(serve_elsewhere(step, flashinfer))


def test_flashinfer_splits_a_long_context(flashinfer):
    """One short chunk behind many blocks: what FlashInfer needs its workspace for."""
    step = make_step(
        [True], [6000], [40], num_decodes=0, group=8, head_size=128, dtype=torch.bfloat16, seed=1
    )
    step = on_device(step, "cuda")
    step.assert_exact(serve_elsewhere(step, flashinfer))


def test_flashinfer_plans_and_runs_without_waiting_for_the_device(flashinfer):
    step = mixed_step()
    serve_elsewhere(step, flashinfer)  # compiles
    torch.cuda.synchronize()
    fresh = dataclasses.replace(step.batch)
    output = torch.full_like(step.q, torch.nan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flashinfer(step.q, step.heads, step.caches, fresh, step.scale, output)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    unwritten = output[step.batch.num_decode_tokens : step.batch.num_tokens].isnan().any(-1)
    assert unwritten[:, 2:4].all()  # the streaming head's
    assert not unwritten[:, [0, 1, 4, 5]].any()


def test_flashinfer_s_plans_may_follow_each_other_closely(flashinfer):
    """The device is still busy with the first steps while the host plans the next ones."""
    steps = [mixed_step(seed=seed, block_size=16) for seed in range(4)]
    for step in steps:
        serve_elsewhere(step, flashinfer)
    ballast = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(8):
        ballast = ballast @ ballast
    outputs = [
        serve_elsewhere(
            dataclasses.replace(step, batch=dataclasses.replace(step.batch)), flashinfer
        )
        for step in steps
    ]
    for step, output in zip(steps, outputs, strict=True):
        step.assert_exact(output)
