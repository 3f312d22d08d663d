"""A hit must never keep a request out: the pool that holds it cold holds it with its prefix cached."""

from __future__ import annotations

import pytest

from tests.kv_cache.caches import Engine, layout_of, two_bins
from vllm_duo.compat.snapshot_orders import take_orders

MIXED = two_bins()
STREAMING = layout_of((0, 0), (2, 2))
LAYOUTS = pytest.mark.parametrize("layout", [MIXED, STREAMING], ids=["mixed", "only streaming"])


def engine_after(num_tokens, layout, num_free):
    """An engine whose cache holds a prompt of ``num_tokens`` tokens, and so many free blocks."""
    engine = Engine(layout, num_blocks=500, enable_caching=True)
    first = engine.request("first", num_tokens)
    assert engine.step(first, num_tokens)
    take_orders(engine.manager)
    engine.manager.free(first)
    # Held by somebody else; what is cached goes last.
    engine.pool.get_new_blocks(engine.pool.get_num_free_blocks() - num_free)
    return engine


def resume(engine, name, num_tokens):
    """Admit the whole of a longer prompt; returns the request and its hit, in tokens."""
    request = engine.request(name, num_tokens)
    _, hit, _ = engine.manager.get_computed_blocks(request)
    assert engine.step(request, num_tokens - hit, whole=True), "the hit keeps the request out"
    return request, hit


def restores(engine):
    return [order for order in take_orders(engine.manager) if not order.store]


@LAYOUTS
@pytest.mark.parametrize("num_tokens", [40, 100, 320, 1000])
def test_a_pool_for_one_request_admits_it_at_any_hit(layout, num_tokens):
    engine = engine_after(33, layout, layout.blocks(num_tokens))
    request, hit = resume(engine, "again", num_tokens)
    assert hit == 32
    tables = engine.tables(request)
    assert len({block for table in tables for block in table}) == layout.blocks(num_tokens)
    assert engine.pool.get_num_free_blocks() == 0


@LAYOUTS
def test_where_the_pool_is_tight_the_snapshot_becomes_the_ring(layout):
    engine = engine_after(33, layout, layout.blocks(320))
    probe = engine.request("probe", 320)
    (*_, snapshot), _, _ = engine.manager.coordinator.find_longest_cache_hit(
        probe.block_hashes, 319
    )
    resume(engine, "again", 320)
    assert restores(engine) == []
    ring = engine.manager.coordinator.single_type_managers[-1].req_to_blocks["again"]
    assert [b.block_id for b in ring[: len(snapshot)]] == [b.block_id for b in snapshot]
    assert all(block.block_hash is None for block in ring)
    # The state goes on changing, so nobody may find it any more.
    assert engine.manager.get_computed_blocks(probe)[1] == 0


@LAYOUTS
def test_where_there_is_room_the_snapshot_stays_for_others(layout):
    engine = engine_after(33, layout, 200)
    resume(engine, "again", 320)
    assert len(restores(engine)) == len(layout.bins)
    _, hit = resume(engine, "another", 40)
    assert hit == 32


@LAYOUTS
def test_a_snapshot_that_this_step_reads_is_left_alone(layout):
    """The first request copies it; the second of the same step must not make it its ring."""
    first, second = layout.blocks(40), layout.blocks(320)
    # Room for both and the snapshot beside them, not a block more.
    snapshots = len(layout.bins) * layout.span.blocks(32)
    engine = engine_after(33, layout, first + second + snapshots)
    one, _ = resume(engine, "one", 40)
    two, hit = resume(engine, "two", 320)
    assert hit == 32
    tables = [set(table) for request in (one, two) for table in engine.tables(request)[-1:]]
    read = {block for order in restores(engine) for block in order.blocks}
    assert not any(table & read for table in tables)
