"""The Triton decode kernels against float64."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

from tests.ops.oracle import SINKS
from tests.ops.steps import far_apart, make_step
from tests.ops.triton_cases import (
    checked,  # noqa: F401
    decode_kernel,
    implementation,  # noqa: F401
)
from vllm_duo.ops import gpu
from vllm_duo.ops.batch import LayerCaches

MIXED = [True, False]
SMALL_TILES = gpu.Tiling(tokens=16, buffers=2, warps=4)


def decode(step):
    output = step.run(decode_kernel.decode)
    step.assert_exact(output)
    step.store.assert_guards()


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("mask", [MIXED, [True], [False]], ids=["both", "retrieval", "streaming"])
def test_triton_decode_is_the_rule(mask, group):
    decode(make_step(mask, [200, 63], [1, 1], group=group, head_size=32, seed=group))


@pytest.mark.parametrize("kind", SINKS)
@pytest.mark.parametrize("programs", [1, 5])
def test_triton_decode_with_learned_sinks(kind, programs, monkeypatch):
    """Of heads that one program serves and of heads whose splits are merged; drafts and padding too."""
    monkeypatch.setattr(gpu, "num_programs", lambda _: programs)
    monkeypatch.setattr(gpu, "tiling", lambda *_: SMALL_TILES)
    decode(make_step(MIXED, [200, 20, 0], [1, 3, 0], group=3, draft_size=7, seed=7, sinks=kind))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
def test_triton_decode_of_every_head_size_and_dtype(head_size, dtype):
    decode(make_step(MIXED, [150], [1], head_size=head_size, dtype=dtype, seed=head_size))


@pytest.mark.parametrize("length", [2, 5, 8])
def test_triton_decode_of_drafts(length):
    chunks = [length, 1, length]
    decode(make_step(MIXED, [130, 3, 0], chunks, group=3, draft_size=7, seed=length))


@pytest.mark.parametrize(
    ("sink", "recent"), [(0, 1), (0, 16), (16, 16), (17, 1), (8, 129), (500, 5), (5, 500)]
)
def test_triton_decode_at_the_edges_of_sink_and_recent(sink, recent):
    sizes = {"sink_size": sink, "recent_size": recent, "streaming_block_size": 12}
    decode(make_step([False], [180, 19], [1, 1], seed=sink, **sizes))


@pytest.mark.parametrize("contexts", [[0], [1], [15, 16], [63, 64, 65]])
def test_triton_decode_of_short_contexts(contexts):
    decode(make_step(MIXED, contexts, [1] * len(contexts), seed=len(contexts)))


def test_triton_decode_writes_nothing_for_empty_requests():
    """Padding of a captured batch: no tokens, no length, table rows of null blocks."""
    step = make_step(MIXED, [100, 0, 0], [1, 0, 0], seed=1)
    step.store.paged.block_table[1:] = 0
    step.store.ring.block_table[1:] = 0
    decode(step)


def test_triton_decode_leaves_the_other_requests_alone():
    """The batch's prefills, behind its decodes, keep their rows as they were."""
    step = make_step(MIXED, [50, 20], [1, 9], num_decodes=1, seed=2)
    output = step.run(decode_kernel.decode)
    step.assert_exact(output, slice(0, 1))
    assert output[1:].isnan().all()


@pytest.mark.parametrize("programs", [1, 2, 5])
def test_triton_decode_does_not_depend_on_the_split(programs, monkeypatch):
    monkeypatch.setattr(gpu, "num_programs", lambda _: programs)
    monkeypatch.setattr(gpu, "tiling", lambda *_: SMALL_TILES)
    decode(make_step([True, False, True], [330, 41], [1, 2], recent_size=100, seed=3))


def test_triton_decode_splits_are_balanced(monkeypatch):
    """No program gets more tiles than its share; a streaming head of few tiles is not split."""
    monkeypatch.setattr(gpu, "num_programs", lambda _: 8)
    monkeypatch.setattr(gpu, "tiling", lambda *_: SMALL_TILES)
    # 25 tiles of the retrieval head, 6 of the streaming head: a share is 4 tiles.
    kernel, seen = decode_kernel._attend.fn, []

    def spy(*args):
        bound = inspect.signature(kernel).bind(*args).arguments
        seen.append((bool(bound["STREAMING"]), int(bound["item"])))
        return kernel(*args)

    monkeypatch.setattr(decode_kernel, "_attend", spy)
    step = make_step(MIXED, [400], [1], seed=4)
    step.assert_exact(step.run(decode_kernel.decode))
    assert seen == [(False, i) for i in range(7)] + [(True, i) for i in range(2)]


def test_triton_decode_keeps_to_its_workspace(monkeypatch):
    """Partial results of one long request behind many short ones, which need none."""
    monkeypatch.setattr(gpu, "num_programs", lambda _: 2)
    monkeypatch.setattr(gpu, "tiling", lambda *_: SMALL_TILES)
    guarded = torch.full((2, 1000, 64), torch.nan)

    def workspace(device, rows, head_size):
        assert rows == 2 * 2 * 16
        return guarded[0], guarded[1].flatten()

    monkeypatch.setattr(gpu, "workspace", workspace)
    decode(make_step([True], [*[9] * 12, 300], [1] * 13, seed=6))
    partials = ~guarded[0].isnan().all(-1)
    assert partials.any()
    assert not partials[2 * 2 * 16 :].any()
    assert guarded[1].flatten()[2 * 2 * 16 :].isnan().all()


@pytest.mark.parametrize("mask", [[True], [False]], ids=["retrieval", "streaming"])
def test_triton_decode_reads_beyond_2_to_the_31_bytes(mask, checked):  # noqa: F811
    sizes = {"head_size": 16, "streaming_block_size": 32}
    step = make_step(mask, [40], [1], dtype=torch.float16, seed=5, **sizes)
    field = "retrieval" if mask[0] else "streaming"
    far = far_apart(getattr(step.caches, field), step.store.paged if mask[0] else step.store.ring)
    step.caches = dataclasses.replace(step.caches, **{field: far})
    step.assert_exact(step.run(decode_kernel.decode))


def test_triton_decode_refuses_long_queries():
    with pytest.raises(ValueError, match="at most 8 tokens, got 9"):
        decode(make_step(MIXED, [20], [9]))


def test_triton_decode_refuses_strided_rows():
    step = make_step(MIXED, [20], [1])
    step.q = step.q.repeat_interleave(2, -1)[..., ::2]
    with pytest.raises(ValueError, match="query must be contiguous in its last dimension"):
        step.run(decode_kernel.decode)


def test_triton_decode_refuses_transposed_caches():
    step = make_step([True], [20], [1])
    wide = step.caches.retrieval.repeat_interleave(2, -1)[..., ::2]
    step.caches = LayerCaches(wide, step.store.paged)
    with pytest.raises(ValueError, match="caches and block tables must be contiguous"):
        step.run(decode_kernel.decode)


@pytest.mark.parametrize("shared", [100 << 10, 164 << 10, 228 << 10])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("head_size", [16, 64, 96, 128, 256])
def test_triton_tiles_of_two_programs_fit(head_size, element_bytes, shared, monkeypatch):
    """With one more buffer, as Hopper's products need it, and the 64 rows of queries of a prefill."""
    monkeypatch.setattr(gpu, "shared_bytes", lambda _: shared)
    tiling = gpu.tiling(head_size, element_bytes, torch.device("cpu"))
    row = gpu.block(head_size, 16) * element_bytes
    tile = 2 * tiling.tokens * row
    assert tiling.tokens in (16, 32, 64)
    assert 1 <= tiling.buffers <= 4
    assert tiling.buffers >= 2 or tile == 16 * 2048
    if row <= 256:
        extra = tile if shared == 228 << 10 else 0
        assert 2 * (tiling.buffers * tile + extra + 64 * row + 1024) <= shared
