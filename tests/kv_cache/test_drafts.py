"""Drafts under vLLM's scheduler: written, accepted or rolled back, and never seen where rejected."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kv_cache.histories import History
from tests.kv_cache.test_histories import history_of, patterns, run  # noqa: F401
from vllm_duo.kv_cache.span import StreamingSpan
from vllm_duo.kv_cache.spec import StreamingSpec


@given(
    sink=st.integers(0, 9),
    recent=st.integers(1, 12),
    drafts=st.integers(0, 9),
    slack=st.integers(0, 9),
    steps=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=30, max_size=60),
)
def test_a_slot_a_draft_is_enough_and_two_less_are_not(sink, recent, drafts, slack, steps):
    """A step of k drafts overwrites nothing nearer than ``slack - k + 1`` before what is seen."""
    span = StreamingSpan(sink_size=sink, recent_size=recent, draft_size=slack, block_size=1)
    ring: dict[int, int] = {}
    start, lost = 0, False
    for count, accepted in [*steps, (drafts, 0), (drafts, 0)]:
        count = min(count, drafts)
        for seen in (*range(min(sink, start)), *range(max(start - recent + 1, 0), start)):
            lost |= ring[span.slot(seen)] != seen
        ring |= {span.slot(position): position for position in range(start, start + 1 + count)}
        start += 1 + min(accepted, count)
    if slack >= drafts - 1:
        assert not lost
    elif start > sink + recent + slack and recent > 1:
        assert lost


@pytest.mark.parametrize(("name", "chunk"), [("one bin", 16), ("only streaming", 48)])
def test_a_ring_without_slack_is_seen(name, chunk):
    """By the worker that finds nothing wrong where the ring has a slot for each draft."""
    history = history_of(name, False, "fcfs", chunk, interval=12, drafts=7)
    history.worker.specs = [
        replace(spec, draft_size=0) if isinstance(spec, StreamingSpec) else spec
        for spec in history.worker.specs
    ]
    with pytest.raises(AssertionError, match="'ring'"):
        run(history, Random(0), 200)


def test_a_proposer_gets_no_more_drafts_than_the_ring_has_slots_for():
    """vLLM takes from a proposer class whatever it proposes; the worker would see its traces."""
    history = history_of("only streaming", False, "fcfs", 48, interval=12, drafts=3)
    history.surplus = 5
    run(history, Random(0), 200)
    assert history.counts["longest"] == 3


def chat(drafts: int, seed: int = 0) -> History:
    """An answer of 49 tokens to 30, then a turn that goes on from there."""
    history = history_of("several bins", True, "fcfs", 48, interval=40, drafts=drafts)
    history.random = Random(seed)
    history.add(0, 0, 30, 49)
    history.drain()
    assert history.counts["hits"] == 0
    history.add(1, 160, 5, 1)
    history.drain()
    return history


@pytest.mark.parametrize("seed", range(8))
def test_a_chat_resumes_where_it_would_without_drafts(seed):
    """Also at boundaries that lie among drafts which were accepted at once."""
    assert chat(0).counts["hits"] == 72
    history = chat(3, seed)
    assert history.counts["accepted"] > 5
    assert history.counts["hits"] == 72


def test_a_prompt_that_is_hit_but_for_one_token_is_padded_with_drafts():
    """vLLM fills such a step up with drafts that are no tokens; all of them are rejected."""
    history = history_of("one bin", True, "fcfs", 48, interval=40, drafts=3)
    history.random = Random(0)
    for base in (0, 1):
        history.add(base, 160, 33 if base == 0 else 1, 4)
        history.drain()
        history.ended = [[], history.ended[-1][:32]]
    assert history.counts["hits"] == 32
    assert history.counts["padding"] == 3
