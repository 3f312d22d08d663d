"""What the compiled module answers to wrong tables, batches and head maps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.ops.oracle import Store
from vllm_duo import _cpu
from vllm_duo.ops import cpu
from vllm_duo.ops.batch import Batch
from vllm_duo.ops.write_kv import write_kv


@pytest.fixture
def implementation(monkeypatch):
    """One variant is enough for checks that all share."""
    monkeypatch.setattr(cpu, "use_reference", False)


@pytest.mark.parametrize(
    ("blocks", "sizes", "message"),
    [
        (torch.zeros(2, 3), (16, True, 4, 8, 8), r"must be \[B, width\] int32"),
        (torch.zeros(2, 3).int()[0], (16, True, 4, 8, 8), r"must be \[B, width\] int32"),
        (torch.zeros(2, 6).int()[:, ::2], (16, True, 4, 8, 8), "with contiguous rows"),
        (torch.zeros(2, 3).int(), (0, False, 0, 0, 0), "retrieval block table has block size 0"),
        (torch.zeros(2, 3).int(), (16, True, -1, 8, 8), "sink -1"),
        (torch.zeros(2, 3).int(), (16, True, 4, 0, 8), "recent 0"),
        (torch.zeros(2, 3).int(), (16, True, 4, 8, 7), "recent 8, ring 7"),
    ],
)
def test_wrong_block_table_is_named(blocks, sizes, message):
    with pytest.raises(ValueError, match=message):
        _cpu.BlockTable(blocks, *sizes)


@pytest.mark.parametrize(
    ("starts", "lens"), [([1, 3], [9]), ([0, 3, 2], [9, 9]), ([0, 3], [2]), ([0, 3, 4], [9])]
)
def test_wrong_batch_is_named(starts, lens):
    with pytest.raises(
        ValueError, match=r"query_start_loc must have one|chunks start at 0 and are not"
    ):
        _cpu.Batch(starts, lens)


def test_requests_beyond_the_batch_are_named():
    store = Store([True], 32, requests=1, max_tokens=40, seed=42)
    batch = Batch.from_host(np.array([0, 1]), np.array([1]), 1)
    tensor = torch.zeros(1, 1, 32)
    arguments = (cpu.ATTEND, tensor, tensor, tensor, store.heads, store.caches, batch)
    for requests in ((0, 2), (-1, 1), (1, 0)):
        with pytest.raises(ValueError, match=r"requests .* to .* of a batch of 1"):
            cpu.run(*arguments, output=tensor.clone(), requests=requests)


@pytest.mark.parametrize(("retrieval", "streaming"), [([0, 2], [3]), ([-1], [0])])
def test_wrong_head_map_is_named(retrieval, streaming):
    with pytest.raises(ValueError, match=r"head map has head (3|-1) of (3|2) KV heads"):
        _cpu.Heads(retrieval, streaming)


def test_wrong_blocks_of_a_snapshot_are_named():
    for blocks in (torch.zeros(3).int(), torch.zeros(6).long()[::2], torch.zeros(3, 1).long()):
        with pytest.raises(ValueError, match=r"blocks must be \[n\] int64"):
            _cpu.Copies().add(True, 0, 16, blocks)


def two_requests(paged=None, ring=None, lens=(40, 30)):
    """A write of two requests, the second of which may be empty; the tables may be others."""
    store = Store([True, False], 32, requests=2, max_tokens=40, seed=46)
    caches = dataclasses.replace(store.caches, paged=paged or store.paged, ring=ring or store.ring)
    starts = np.cumsum([0, *lens])
    key = torch.zeros(starts[-1], 2, 32)
    write_kv(key, key, store.heads, caches, Batch.from_host(starts, np.array([40, 30]), 0))
    return store


@pytest.mark.parametrize("name", ["retrieval", "streaming"])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (1, 0), (1, -1)])
@pytest.mark.parametrize("block", [-1, 0, "first after the last"])
def test_block_of_no_cache_is_named_in_full_checks(name, row, column, block, monkeypatch):
    """In any row, up to the last column in use; what is behind it may be anything."""
    monkeypatch.setattr(cpu, "FULL_CHECKS", True)
    store = two_requests()
    field, table = ("paged", store.paged) if name == "retrieval" else ("ring", store.ring)
    used = -(-30 // table.block_size)
    if block == "first after the last":
        block = len(getattr(store.caches, name))
    table.block_table[1, used:] = block
    two_requests(**{field: table})
    column %= used
    table.block_table[row, column] = block
    message = f"{name} block table has block {block} at row {row}, column {column}: blocks are 1"
    with pytest.raises(ValueError, match=message):
        two_requests(**{field: table})


def test_tables_of_empty_requests_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(cpu, "FULL_CHECKS", True)
    store = two_requests()
    for table in (store.paged, store.ring):
        table.block_table[1] = 0
    two_requests(store.paged, store.ring, lens=(40, 0))


def test_short_tables_are_named():
    store = two_requests()
    paged = dataclasses.replace(store.paged, block_table=store.paged.block_table[:1])
    with pytest.raises(ValueError, match="retrieval block table has 1 rows, the batch has 2"):
        two_requests(paged)
    paged = dataclasses.replace(store.paged, block_table=store.paged.block_table[:, :2])
    with pytest.raises(ValueError, match="has 2 columns, request 0 needs 3"):
        two_requests(paged)


def test_ring_table_without_columns_for_its_slack_is_named():
    """A request that has filled the ring: 20 + 8 + 12 slots in blocks of 8."""
    store = Store([False], 32, requests=1, max_tokens=100, recent_size=8, draft_size=12, seed=47)
    batch = Batch.from_host(np.array([0, 1]), np.array([100]), 1)
    key = torch.zeros(1, 1, 32)
    write_kv(key, key, store.heads, store.caches, batch)
    ring = dataclasses.replace(store.ring, block_table=torch.arange(1, 5).int()[None])
    caches = dataclasses.replace(store.caches, ring=ring)
    with pytest.raises(ValueError, match="streaming block table has 4 columns, request 0 needs 5"):
        write_kv(key, key, store.heads, caches, batch)
