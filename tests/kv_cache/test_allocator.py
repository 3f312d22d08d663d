"""RingAllocator against a simple model: a list of blocks per request and a pool that counts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_duo.kv_cache.allocator import RingAllocator
from vllm_duo.kv_cache.span import StreamingSpan


@dataclass(eq=False)
class FakeBlock:
    block_id: int
    is_null: bool = False
    ref_cnt: int = 0


class FakePool:
    """Hands out blocks in order of their ids, block 0 (the null block) never."""

    def __init__(self, num_blocks: int) -> None:
        self.null = FakeBlock(0, is_null=True)
        self.blocks = [FakeBlock(index) for index in range(1, num_blocks + 1)]
        self.free = list(self.blocks)

    def get_new_blocks(self, num_blocks):
        if num_blocks > len(self.free):
            raise ValueError(f"{num_blocks} blocks asked for, {len(self.free)} free")
        taken, self.free = self.free[:num_blocks], self.free[num_blocks:]
        for block in taken:
            block.ref_cnt += 1
        return taken

    def free_blocks(self, ordered_blocks):
        for block in ordered_blocks:
            block.ref_cnt -= 1
            self.free.append(block)


SPAN = StreamingSpan(sink_size=4, recent_size=8, block_size=4)


@pytest.fixture
def pool() -> FakePool:
    return FakePool(16)


@pytest.fixture
def ring(pool) -> RingAllocator:
    return RingAllocator(SPAN, pool)


def ids(blocks) -> list[int]:
    return [block.block_id for block in blocks]


class TestClaims:
    def test_blocks_come_as_positions_arrive(self, ring):
        claimed = [ids(ring.claim("a", num_tokens)) for num_tokens in (1, 4, 5, 8, 9, 12, 1000)]
        assert claimed == [[1], [], [2], [], [3], [], []]

    def test_sink_and_ring_share_a_block(self, pool):
        span = StreamingSpan(sink_size=5, recent_size=6, block_size=4)  # 11 slots in 3 blocks
        ring = RingAllocator(span, pool)
        for num_tokens in (3, 5, 6, 11):
            ring.claim("a", num_tokens)
        assert ids(ring.tables["a"]) == [1, 2, 3]
        assert ids(ring.claim("b", 5)) == [4, 5]  # the first ring slots lie in the second block

    def test_one_long_chunk_claims_the_whole_ring_and_no_more(self, ring):
        assert len(ring.claim("a", 100_000)) == SPAN.max_blocks

    @pytest.mark.parametrize(
        ("num_tokens", "held", "missing"), [(6, 0, 2), (13, 2, 1), (1000, 3, 0)]
    )
    def test_missing_blocks_of_the_worked_example(self, ring, pool, num_tokens, held, missing):
        if held:
            ring.tables["a"] = list(pool.get_new_blocks(held))
        assert ring.missing_blocks("a", num_tokens) == missing

    def test_asking_claims_nothing(self, ring):
        ring.missing_blocks("a", 100)
        assert "a" not in ring.tables
        assert ring.held_blocks() == 0

    @pytest.mark.parametrize("claimed", [0, 1, 4, 5, 8, 9, 13])
    def test_nothing_is_missing_within_the_room(self, ring, claimed):
        ring.claim("a", claimed)
        room = ring.room("a")
        assert room >= claimed
        for num_tokens in (*range(1, 20), 10**9):
            assert (ring.missing_blocks("a", num_tokens) == 0) == (num_tokens <= room)

    def test_constant_at_any_length(self, ring):
        ring.claim("a", 12)
        before = ids(ring.tables["a"])
        for num_tokens in (13, 10_000, 10_000_000):
            assert ring.claim("a", num_tokens) == []
        assert ids(ring.tables["a"]) == before

    def test_fewer_tokens_give_nothing_back(self, ring):
        ring.claim("a", 12)
        assert ring.missing_blocks("a", 1) == 0
        assert ring.claim("a", 1) == []
        assert ring.held_blocks() == 3

    def test_empty_pool_changes_nothing(self, ring, pool):
        pool.get_new_blocks(15)
        with pytest.raises(ValueError, match="3 blocks asked for, 1 free"):
            ring.claim("a", 12)
        assert "a" not in ring.tables
        ring.check_integrity()


class TestRelease:
    def test_pop_returns_the_table_in_order(self, ring):
        ring.claim("a", 12)
        ring.claim("b", 5)
        assert ids(ring.pop("a")) == [1, 2, 3]
        assert ring.held_blocks() == 2

    def test_unknown_request_has_no_blocks(self, ring):
        assert ring.pop("a") == []

    def test_resumed_request_starts_anew(self, ring, pool):
        ring.claim("a", 12)
        pool.free_blocks(reversed(ring.pop("a")))
        assert len(ring.claim("a", 6)) == 2
        ring.check_integrity()


class TestIntegrity:
    def test_table_too_long(self, ring, pool):
        ring.claim("a", 12)
        ring.tables["a"] += pool.get_new_blocks(1)
        ring._held += 1
        with pytest.raises(RuntimeError, match="request a holds 4 streaming blocks, at most 3"):
            ring.check_integrity()

    def test_null_block(self, ring, pool):
        ring.claim("a", 4)
        ring.tables["a"] = [pool.null]
        with pytest.raises(RuntimeError, match="block 0 of request a is null"):
            ring.check_integrity()

    def test_free_block(self, ring, pool):
        ring.claim("a", 4)
        pool.free_blocks(ring.tables["a"])
        with pytest.raises(RuntimeError, match="block 1 of request a is free"):
            ring.check_integrity()

    def test_block_of_two_requests(self, ring):
        ring.claim("a", 4)
        ring.claim("b", 4)
        ring.tables["b"] = ring.tables["a"]
        with pytest.raises(RuntimeError, match="block 1 of request b is shared"):
            ring.check_integrity()

    def test_block_twice_in_a_table(self, ring):
        ring.claim("a", 8)
        ring.tables["a"][1] = ring.tables["a"][0]
        with pytest.raises(RuntimeError, match="block 1 of request a is shared"):
            ring.check_integrity()

    def test_wrong_count(self, ring, pool):
        ring.claim("a", 12)
        ring.tables["a"].pop()
        with pytest.raises(RuntimeError, match="the tables do not hold 3 streaming blocks"):
            ring.check_integrity()


class RingMachine(RuleBasedStateMachine):
    """Requests that grow, finish, abort, are preempted and come back; the model keeps lengths."""

    POOL_BLOCKS = 24

    @initialize(
        sink_size=st.integers(0, 9),
        recent_size=st.integers(1, 20),
        draft_size=st.integers(0, 3),
        block_size=st.integers(1, 8),
    )
    def start(self, **sizes):
        self.span = StreamingSpan(**sizes)
        self.pool = FakePool(self.POOL_BLOCKS)
        self.ring = RingAllocator(self.span, self.pool)
        self.lengths: dict[str, int] = {}
        self.preempted: dict[str, int] = {}
        self.tables: dict[str, list[int]] = {}

    def claim(self, request, num_tokens):
        missing = self.ring.missing_blocks(request, num_tokens)
        if missing > len(self.pool.free):  # vLLM asks first
            return
        new = ids(self.ring.claim(request, num_tokens))
        assert len(new) == missing
        self.lengths[request] = max(self.lengths.get(request, 0), num_tokens)
        self.tables.setdefault(request, []).extend(new)

    def release(self, request):
        self.pool.free_blocks(reversed(self.ring.pop(request)))
        self.tables.pop(request)
        return self.lengths.pop(request)

    @rule(request=st.sampled_from("abcd"), chunk=st.integers(1, 40))
    def grow(self, request, chunk):
        if request not in self.preempted:
            self.claim(request, self.lengths.get(request, 0) + chunk)

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def finish_or_abort(self, data):
        self.release(data.draw(st.sampled_from(sorted(self.lengths))))

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def preempt(self, data):
        request = data.draw(st.sampled_from(sorted(self.lengths)))
        self.preempted[request] = self.release(request)

    @precondition(lambda self: self.preempted)
    @rule(data=st.data(), first_chunk=st.integers(1, 40))
    def resume(self, data, first_chunk):
        request = data.draw(st.sampled_from(sorted(self.preempted)))
        self.claim(request, min(first_chunk, self.preempted.pop(request)))

    @rule(request=st.sampled_from("abcd"))
    def abort_before_anything_was_claimed(self, request):
        if request not in self.lengths:
            assert self.ring.pop(request) == []

    @invariant()
    def integrity(self):
        if hasattr(self, "ring"):
            self.ring.check_integrity()

    @invariant()
    def free_and_held_are_all(self):
        if hasattr(self, "ring"):
            assert self.ring.held_blocks() + len(self.pool.free) == self.POOL_BLOCKS

    @invariant()
    def tables_are_those_of_the_model(self):
        for request, table in getattr(self, "tables", {}).items():
            assert ids(self.ring.tables[request]) == table
            assert len(table) == self.span.blocks(self.lengths[request])


RingMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestAnyHistory = RingMachine.TestCase
