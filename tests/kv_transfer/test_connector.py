"""The worker's side: copies to and from the pool, and nothing of a step that has failed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.worker import kv_connector_model_runner_mixin as mixin

from vllm_duo.kv_transfer import DuoStorageConnector, copier
from vllm_duo.kv_transfer.orders import Load, Save, StorageMetadata
from vllm_duo.kv_transfer.pool_shape import PoolShape
from vllm_duo.kv_transfer.store import Key, Kind

KEY = Key(Kind.RING, b"p" * 32)
SHAPE = PoolShape(num_blocks=4, block_bytes=8, page_tokens=16, pages=None, rings=())


class Files:
    """Stands for a writer: what it was given."""

    def __init__(self, stored=(), waiting=()):
        self.store = SimpleNamespace(has=lambda key: key in stored)
        self.waiting, self.given = waiting, {}

    def wants(self, key, num_bytes):
        return key not in self.waiting

    def submit(self, key, parts, when_ns):
        self.given[key] = b"".join(bytes(part) for part in parts)


@pytest.fixture
def pool():
    return np.arange(32, dtype=np.uint8).reshape(4, 8)


def save(replace=False):
    return Save(KEY, (((3, 1), 2), ((2,), 8)), 5, replace)


def test_saved_are_the_leading_bytes_of_the_blocks_in_order(pool):
    files = Files()
    copier.save(pool, [save()], files)
    pool[:] = 0
    assert files.given == {KEY: bytes([24, 25, 8, 9, *range(16, 24)])}, "and a copy of them"


def test_what_is_stored_or_waits_is_not_copied_again(pool):
    for files in (Files(stored=[KEY]), Files(waiting=[KEY])):
        copier.save(pool, [save()], files)
        assert files.given == {}
    files = Files(stored=[KEY])
    copier.save(pool, [save(replace=True)], files)
    assert list(files.given) == [KEY], "a damaged one is"


def test_loads_fill_their_blocks_and_no_other_byte(pool):
    before = pool.copy()
    copier.load(pool, [Load((3, 1), np.full((2, 3), 99, np.uint8))])
    changed = np.argwhere(pool != before).tolist()
    assert changed == [[block, byte] for block in (1, 3) for byte in range(3)]
    assert (pool[[1, 3], :3] == 99).all()


def test_the_pool_is_the_caches_own_memory():
    storage = torch.zeros(32, dtype=torch.int8)
    caches = {"a": storage.view(4, 8)[:, :4], "b": storage.view(torch.float32)}
    pool = copier.pool_of(caches, SHAPE)
    pool[2, 1] = 7
    assert storage[17] == 7


def test_caches_that_do_not_share_a_pool_are_an_error():
    caches = {"a": torch.zeros(32, dtype=torch.int8), "b": torch.zeros(32, dtype=torch.int8)}
    with pytest.raises(RuntimeError, match="expected all KV caches in one pool of 32 bytes"):
        copier.pool_of(caches, SHAPE)


@pytest.mark.parametrize("fails", [False, True])
def test_a_failed_forward_pass_stores_nothing(fails, pool, monkeypatch):
    connector = object.__new__(DuoStorageConnector)
    connector._pool, connector._writer = pool, Files()
    connector._connector_metadata = None
    monkeypatch.setattr(mixin, "get_kv_transfer_group", lambda: connector)
    monkeypatch.setattr(mixin, "get_forward_context", lambda: None)
    step = SimpleNamespace(
        kv_connector_metadata=StorageMetadata(b"s" * 32, saves=[save()]),
        has_sync_kv_loads=False,
        finished_req_ids=set(),
    )

    def run_step():
        with mixin.KVConnectorModelRunnerMixin._get_kv_connector_output(step):
            if fails:
                raise ValueError("the forward pass")

    if fails:
        with pytest.raises(ValueError, match="the forward pass"):
            run_step()
    else:
        run_step()
    assert len(connector._writer.given) == (not fails)
