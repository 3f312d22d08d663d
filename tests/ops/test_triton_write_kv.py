"""The Triton kernels that copy: write_kv and copy_snapshots, bit for bit the references."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from tests.ops.steps import clone, far_apart, guards, make_step
from tests.ops.triton_cases import (
    checked,  # noqa: F401
    implementation,  # noqa: F401
    snapshot_kernel,
    write_kernel,
)
from vllm_duo.ops import gpu
from vllm_duo.ops.batch import SnapshotCopy
from vllm_duo.ops.snapshot import reference as snapshot_reference
from vllm_duo.ops.write_kv import reference

MIXED = [True, False, True]


def same(a, b):
    """Equal bit for bit, NaN included."""
    if a is None or b is None:
        return a is b
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.view(kind), b.view(kind))


def assert_like_reference(step):
    expected = clone(step.caches)
    reference.write_retrieval(step.k, step.v, step.heads, expected, step.batch)
    reference.write_streaming(step.k, step.v, step.heads, expected, step.batch)
    write_kernel.write_kv(step.k, step.v, step.heads, step.caches, step.batch)
    assert same(step.caches.retrieval, expected.retrieval)
    assert same(step.caches.streaming, expected.streaming)
    step.store.assert_guards()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_size", [64, 96])
def test_triton_write_copies_bit_for_bit(head_size, dtype):
    assert_like_reference(make_step(MIXED, [30], [5], head_size=head_size, dtype=dtype))


@pytest.mark.parametrize("mask", [MIXED, [True], [False]], ids=["both", "retrieval", "streaming"])
@pytest.mark.parametrize(("sink", "recent"), [(0, 1), (20, 24), (7, 31), (200, 9)])
def test_triton_write_of_chunks_longer_than_the_ring(mask, sink, recent):
    """A chunk that overtakes itself, one that starts in the sink, an empty one and a decode."""
    sizes = {"sink_size": sink, "recent_size": recent, "streaming_block_size": 5}
    assert_like_reference(make_step(mask, [3, 90, 0, 41], [70, 1, 0, 33], head_size=16, **sizes))


def test_triton_write_leaves_the_null_block_alone():
    """Rows of null blocks, as a padded request has, and a length without tokens."""
    step = make_step(MIXED, [20, 10], [1, 1], head_size=16)
    step.store.paged.block_table[1] = 0
    step.store.ring.block_table[1] = 0
    write_kernel.write_kv(step.k, step.v, step.heads, step.caches, step.batch)
    assert step.caches.retrieval[0].isnan().all()
    assert step.caches.streaming[0].isnan().all()


def test_triton_write_of_one_class_leaves_the_other():
    step = make_step(MIXED, [20], [3], head_size=16)
    before = clone(step.caches)
    args = (step.k, step.v, step.heads, step.caches, step.batch)
    write_kernel.write_retrieval(*args)
    assert same(step.caches.streaming, before.streaming)
    assert not same(step.caches.retrieval, before.retrieval)
    after = clone(step.caches)
    write_kernel.write_streaming(*args)
    assert same(step.caches.retrieval, after.retrieval)
    assert not same(step.caches.streaming, before.streaming)


def test_triton_write_of_strided_keys():
    """Keys and values as a fused projection leaves them: slices of wider rows."""
    step = make_step(MIXED, [20], [6], head_size=16)
    both = torch.cat([step.k, step.v], dim=1)
    step.k, step.v = both[:, :3], both[:, 3:]
    assert_like_reference(step)


@pytest.mark.parametrize("mask", [[True], [False]], ids=["retrieval", "streaming"])
def test_triton_write_beyond_2_to_the_31_bytes(mask, checked):  # noqa: F811
    sizes = {"head_size": 16, "streaming_block_size": 32}
    step = make_step(mask, [40], [2], dtype=torch.float16, seed=5, **sizes)
    field = "retrieval" if mask[0] else "streaming"
    near = getattr(step.caches, field)
    far = far_apart(near, step.store.paged if mask[0] else step.store.ring)
    caches = dataclasses.replace(step.caches, **{field: far})
    write_kernel.write_kv(step.k, step.v, step.heads, caches, step.batch)
    assert_like_reference(step)
    assert same(far, near)


def snapshots(step, copies):
    ring = dataclasses.replace(step.store.ring, copies=tuple(copies))
    step.caches = dataclasses.replace(step.caches, ring=ring)
    expected = clone(step.caches)
    args = (step.k, step.v, step.heads)
    snapshot_reference.copy_snapshots(*args, expected, step.batch)
    snapshot_kernel.copy_snapshots(*args, step.caches, step.batch)
    assert same(step.caches.streaming, expected.streaming)
    assert same(step.caches.retrieval, expected.retrieval)


@pytest.mark.parametrize(
    ("context", "chunk", "boundary"),
    [
        (0, 40, 10),
        (0, 40, 40),
        (50, 60, 50),
        (50, 60, 110),
        (50, 60, 71),
        (10, 30, 33),
        (99, 1, 100),
    ],
)
def test_triton_snapshot_stores_the_state_at_the_boundary(context, chunk, boundary):
    sizes = {"sink_size": 13, "recent_size": 30, "streaming_block_size": 5}
    step = make_step(MIXED, [context, 20], [chunk, 1], head_size=16, **sizes)
    width = -(-min(boundary, 43) // 5)
    snapshots(step, [SnapshotCopy(True, 0, boundary, guards(step)[:width])])


def test_triton_snapshot_is_restored_in_the_step_that_stores_it():
    """Store twice and restore from the first, in this order."""
    sizes = {"sink_size": 8, "recent_size": 32, "streaming_block_size": 40}
    step = make_step(MIXED, [60, 64, 64], [10, 1, 3], head_size=16, **sizes)
    free = guards(step)
    snapshots(
        step,
        [
            SnapshotCopy(True, 0, 64, free[:1]),
            SnapshotCopy(False, 1, 64, free[:1]),
            SnapshotCopy(True, 0, 68, free[1:2]),
            SnapshotCopy(False, 2, 64, free[:1]),
        ],
    )


def test_triton_snapshot_orders_from_a_buffer():
    """What a captured graph replays: a buffer longer than its orders, none of them at first."""
    step = make_step(MIXED, [60], [10], head_size=16)
    copy = SnapshotCopy(True, 0, 64, guards(step)[:12])
    packed = gpu.pack_copies((copy,), step.store.ring.block_table.shape[1])
    buffer = torch.full((8, packed.shape[1]), 99, dtype=torch.int32)
    buffer[0, 0] = 0
    ring = dataclasses.replace(step.store.ring, orders=buffer)
    step.caches = dataclasses.replace(step.caches, ring=ring)
    args = (step.k, step.v, step.heads, step.caches, step.batch)
    before = clone(step.caches)
    snapshot_kernel.copy_snapshots(*args)
    assert same(step.caches.streaming, before.streaming)
    buffer[: len(packed)] = packed
    snapshot_kernel.copy_snapshots(*args)
    expected = dataclasses.replace(before, ring=dataclasses.replace(before.ring, copies=(copy,)))
    snapshot_reference.copy_snapshots(*args[:3], expected, step.batch)
    assert same(step.caches.streaming, expected.streaming)


def test_triton_write_gives_no_slot_to_two_tokens(monkeypatch):
    """Which of two would win is a race on a GPU; the interpreter would let the later one."""
    written = []
    store = interpreter.interpreter_builder.create_masked_store

    def spy(pointers, value, mask, *args):
        written.append(pointers.data[mask.data])
        return store(pointers, value, mask, *args)

    monkeypatch.setattr(interpreter.interpreter_builder, "create_masked_store", spy)
    sizes = {"sink_size": 7, "recent_size": 11, "streaming_block_size": 5}
    step = make_step([True, False], [3, 40], [70, 19], head_size=16, **sizes)
    write_kernel.write_kv(step.k, step.v, step.heads, step.caches, step.batch)
    addresses = np.concatenate(written)
    assert len(np.unique(addresses)) == len(addresses)
    assert len(addresses) == 2 * 16 * (89 + 4 + 11 + 11)
