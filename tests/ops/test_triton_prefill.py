"""The Triton prefill kernel against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.ops.oracle import SINKS
from tests.ops.steps import far_apart, make_step
from tests.ops.triton_cases import (
    checked,  # noqa: F401
    implementation,  # noqa: F401
    prefill_kernel,
)
from vllm_duo.ops import triton_tools

MIXED = [True, False]


def prefill(step):
    output = step.run(prefill_kernel.prefill)
    step.assert_exact(output)
    step.store.assert_guards()


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("mask", [MIXED, [True], [False]], ids=["both", "retrieval", "streaming"])
def test_triton_prefill_is_the_rule(mask, group):
    step = make_step(mask, [37, 0], [21, 9], num_decodes=0, group=group, head_size=32, seed=group)
    prefill(step)


@pytest.mark.parametrize("kind", SINKS)
def test_triton_prefill_with_learned_sinks(kind):
    prefill(make_step(MIXED, [37, 0], [41, 9], num_decodes=0, group=3, seed=8, sinks=kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
def test_triton_prefill_of_every_head_size_and_dtype(head_size, dtype):
    prefill(make_step(MIXED, [90], [17], num_decodes=0, head_size=head_size, dtype=dtype))


@pytest.mark.parametrize(
    ("sink", "recent"), [(0, 1), (0, 16), (16, 16), (17, 1), (8, 33), (500, 5), (5, 500)]
)
@pytest.mark.parametrize("context", [0, 10, 130])
def test_triton_prefill_at_the_edges_of_sink_and_recent(sink, recent, context):
    sizes = {"sink_size": sink, "recent_size": recent, "streaming_block_size": 12}
    prefill(make_step([False], [context], [70], num_decodes=0, seed=sink, **sizes))


@pytest.mark.parametrize("chunks", [[1], [31, 32], [33, 1, 0, 64]])
def test_triton_prefill_of_odd_chunks(chunks):
    """Chunks of exactly a tile's queries, of one more, and empty ones."""
    contexts = [5 * i for i in range(len(chunks))]
    prefill(make_step(MIXED, contexts, chunks, num_decodes=0, seed=len(chunks)))


def test_triton_prefill_leaves_the_decodes_alone():
    step = make_step(MIXED, [50, 20, 0], [2, 40, 11], num_decodes=1, seed=2)
    output = step.run(prefill_kernel.prefill)
    step.assert_exact(output, slice(2, None))
    assert output[:2].isnan().all()


def test_triton_prefill_of_streaming_heads_alone():
    """The retrieval heads' rows stay for the kernel that serves them."""
    step = make_step([False, True, False], [40], [30], num_decodes=0, seed=3)
    output = step.run(prefill_kernel.prefill, retrieval=False)
    assert output[:, 2:4].isnan().all()
    output[:, 2:4] = step.run(prefill_kernel.prefill)[:, 2:4]
    step.assert_exact(output)


@pytest.fixture
def folds(monkeypatch):
    """Key tiles that a streaming head's chunk of so many tokens meets behind a context."""
    fold, count = triton_tools.fold, []

    def spy(*args):
        count.append(1)
        return fold(*args)

    monkeypatch.setattr(triton_tools, "fold", spy)

    def counted(context, chunk):
        count.clear()
        sizes = {"sink_size": 16, "recent_size": 70}
        step = make_step([False], [context], [chunk], num_decodes=0, seed=4, **sizes)
        step.assert_exact(step.run(prefill_kernel.prefill))
        return len(count)

    return counted


def test_triton_prefill_of_streaming_heads_costs_the_same_at_any_context(folds):
    assert folds(200, 64) == folds(1500, 64)


def test_triton_prefill_of_streaming_heads_costs_the_same_at_any_place_in_the_chunk(folds):
    """A tile of 32 queries: one tile of 64 keys for the sink, two for its band of 101."""
    assert folds(100, 160) - folds(100, 128) == 3
    assert folds(100, 288) - folds(100, 256) == 3


@pytest.mark.parametrize("mask", [[True], [False]], ids=["retrieval", "streaming"])
def test_triton_prefill_reads_beyond_2_to_the_31_bytes(mask, checked):  # noqa: F811
    sizes = {"head_size": 16, "streaming_block_size": 32}
    step = make_step(mask, [40], [5], dtype=torch.float16, num_decodes=0, seed=5, **sizes)
    field = "retrieval" if mask[0] else "streaming"
    far = far_apart(getattr(step.caches, field), step.store.paged if mask[0] else step.store.ring)
    step.caches = dataclasses.replace(step.caches, **{field: far})
    step.assert_exact(step.run(prefill_kernel.prefill))
