"""Snapshots of the streaming state: a request that resumes from one answers as if it had run itself."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.ops.oracle import CACHE_LAYOUTS, Sequence, Store, run_step
from tests.ops.test_attention import assert_rule_holds, make_sequences
from vllm_duo.ops.batch import SnapshotCopy

MASK = [True, False, False]
SCALE = 32**-0.5


class Pair:
    """Two requests with the same tokens; the second resumes at ``boundary``, a multiple of 16."""

    def __init__(self, boundary, *, sink=20, recent=75, ring_block=8, draft_size=0):
        self.sink, self.recent, self.boundary = sink, recent, boundary
        self.store = Store(
            MASK,
            32,
            requests=2,
            max_tokens=400,
            streaming_block_size=ring_block,
            sink_size=sink,
            recent_size=recent,
            draft_size=draft_size,
            seed=50,
        )
        paged, ring = self.store.paged.block_table, self.store.ring.block_table
        paged[1, : boundary // 16] = paged[0, : boundary // 16]
        used = -(-min(boundary, sink + recent + draft_size) // ring_block)
        held = set(ring.flatten().tolist())
        free = [i for i in range(1, len(self.store.caches.streaming)) if i not in held]
        # Of a longer list: who looks beyond its end finds a block of nobody.
        self.blocks = torch.tensor(free)[:used]
        (self.first,) = make_sequences([400], 3, 2, 32, torch.float32, seed=51)
        self.second = Sequence(self.first.q, self.first.k, self.first.v)

    def stored(self, row=0):
        return SnapshotCopy(True, row, self.boundary, self.blocks)

    def restored(self, row=0):
        return SnapshotCopy(False, row, self.boundary, self.blocks)

    def assert_rule_holds(self):
        for sequence in (self.first, self.second):
            skipped = sequence.done - sum(map(len, sequence.outputs))
            assert skipped in (0, self.boundary)
            # The first request computed what the second one skipped.
            outputs = [torch.cat(self.first.outputs)[:skipped], *sequence.outputs]
            tokens = (tensor[: sequence.done] for tensor in (sequence.q, sequence.k, sequence.v))
            served = Sequence(*tokens, outputs=outputs)
            assert_rule_holds([served], MASK, self.sink, self.recent, SCALE)


@pytest.mark.parametrize(("one_call", "ring_block"), [(False, 8), (True, 13)])
@pytest.mark.parametrize(
    ("boundary", "chunks"),
    [
        (16, (30, 100)),  # the sink is not yet full
        (96, (60, 80, 200)),  # in the middle of a chunk that begins in the ring
        (192, (100, 92, 100)),  # at the end of a chunk
        (192, (192, 1, 150)),  # where a chunk begins: the ring as it is
        (256, (256, 60)),  # a chunk longer than the ring
    ],
)
def test_resumed_request_answers_as_if_it_had_run(boundary, chunks, one_call, ring_block):
    pair = Pair(boundary, ring_block=ring_block)
    todo = True
    for chunk in chunks:
        inside = pair.first.done <= boundary <= pair.first.done + chunk
        # Where the boundary is one chunk's end and the next one's begin, the later one stores it.
        later = pair.first.done + chunk == boundary and chunks[-2] == 1
        copies = [pair.stored()] if todo and inside and not later else []
        todo = todo and not copies
        run_step(pair.store, [pair.first], [chunk], SCALE, copies=copies, one_call=one_call)
    assert not todo
    pair.second.done = boundary
    for chunk in (40, 1, 70):
        copies = [pair.restored()] if pair.second.done == boundary else []
        run_step(
            pair.store, [pair.second], [chunk], SCALE, rows=[1], copies=copies, one_call=one_call
        )
    pair.assert_rule_holds()


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_snapshots_of_a_cache_with_its_own_strides(layout):
    pair = Pair(96, ring_block=13)
    cache = layout(pair.store.caches.streaming)
    pair.store.caches = dataclasses.replace(pair.store.caches, streaming=cache)
    run_step(pair.store, [pair.first], [60], SCALE)
    run_step(pair.store, [pair.first], [80], SCALE, copies=[pair.stored()])
    pair.second.done = 96
    run_step(pair.store, [pair.second], [40], SCALE, rows=[1], copies=[pair.restored()])
    run_step(pair.store, [pair.first, pair.second], [200, 1], SCALE)
    pair.assert_rule_holds()


def test_one_request_resumes_at_what_another_stores_in_the_same_step():
    """As vLLM schedules it when two requests with one prompt arrive together."""
    pair = Pair(192)
    pair.second.done = 192
    run_step(
        pair.store,
        [pair.first, pair.second],
        [250, 130],
        SCALE,
        copies=[pair.stored(0), pair.restored(1)],
        one_call=True,
    )
    run_step(pair.store, [pair.first, pair.second], [20, 20], SCALE, one_call=True)
    pair.assert_rule_holds()


@pytest.mark.parametrize("one_call", [False, True])
@pytest.mark.parametrize("accepted", [2, 3, 5])
@pytest.mark.parametrize("before", [94, 190])
def test_a_boundary_among_accepted_drafts_is_stored_a_step_later(before, accepted, one_call):
    """The ring then has later tokens than the boundary, and rejected drafts after these."""
    boundary, after = before + 2, before + 1 + accepted
    pair = Pair(boundary, draft_size=5, ring_block=13)
    run_step(pair.store, [pair.first], [before], SCALE, one_call=one_call)
    (wrong,) = make_sequences([400], 3, 2, 32, torch.float32, seed=52)
    drafts = Sequence(
        *(torch.cat([getattr(pair.first, n)[:after], getattr(wrong, n)[after:]]) for n in "qkv"),
        done=before,
    )
    run_step(pair.store, [drafts], [6], SCALE, decode_up_to=8, one_call=one_call)
    pair.first.outputs.append(drafts.outputs[0][: 1 + accepted])
    pair.first.done = after
    run_step(pair.store, [pair.first], [6], SCALE, copies=[pair.stored()], one_call=one_call)
    pair.second.done = boundary
    for chunk in (6, 1, 120):
        copies = [pair.restored()] if pair.second.done == boundary else []
        run_step(
            pair.store, [pair.second], [chunk], SCALE, rows=[1], copies=copies, one_call=one_call
        )
    pair.assert_rule_holds()


def test_a_boundary_before_the_rings_slack_is_refused():
    pair = Pair(96, draft_size=5)
    run_step(pair.store, [pair.first], [60], SCALE)
    copy = SnapshotCopy(True, 0, 54, pair.blocks)
    with pytest.raises(ValueError, match="reaches it, got tokens 55 to 61"):
        run_step(pair.store, [pair.first], [1], SCALE, copies=[copy])


@pytest.mark.parametrize("boundary", [16, 96, 192])
def test_nothing_but_the_snapshots_blocks_is_touched(boundary):
    pair = Pair(boundary)
    ids = {*pair.store.ring.block_table[0].tolist(), *pair.blocks.tolist()}
    run_step(pair.store, [pair.first], [250], SCALE, copies=[pair.stored()])
    others = torch.tensor([i not in ids for i in range(len(pair.store.caches.streaming))])
    assert pair.store.caches.streaming[others].isnan().all()


@pytest.mark.parametrize("one_call", [False, True])
@pytest.mark.parametrize(
    ("store", "num_tokens", "message"),
    [
        (True, 59, "a snapshot at 59 tokens needs a chunk that reaches it, got tokens 60 to 90"),
        (True, 91, "a snapshot at 91 tokens needs a chunk that reaches it, got tokens 60 to 90"),
        (False, 59, "a snapshot of 59 tokens cannot restore a request with 60 tokens"),
    ],
)
def test_copy_that_does_not_fit_its_request_is_refused(store, num_tokens, message, one_call):
    pair = Pair(96)
    run_step(pair.store, [pair.first], [60], SCALE)
    copy = SnapshotCopy(store, 0, num_tokens, pair.blocks)
    with pytest.raises(ValueError, match=message):
        run_step(pair.store, [pair.first], [30], SCALE, copies=[copy], one_call=one_call)


@pytest.mark.parametrize("num_tokens", [60, 90])
def test_both_ends_of_a_chunk_can_be_stored(num_tokens):
    pair = Pair(96)
    run_step(pair.store, [pair.first], [60], SCALE)
    copy = SnapshotCopy(True, 0, num_tokens, pair.blocks)
    run_step(pair.store, [pair.first], [30], SCALE, copies=[copy])
    state = pair.store.caches.streaming[pair.blocks].transpose(1, 2).flatten(0, 1)
    rows = torch.cat([pair.first.k, pair.first.v], -1)[:, 1:]
    columns, offsets = pair.store.ring.table_slots(np.arange(num_tokens))
    assert torch.equal(state[columns * 8 + offsets], rows[:num_tokens])
