"""Drafts beyond those that a ring has slots for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.outputs import DraftTokenIds

from tests.messages import messages_of
from vllm_duo.compat import draft_count
from vllm_duo.compat.pool_report import LAYOUT

MANY = DraftTokenIds(["a", "b", "c"], [[1, 2, 3], [], [4]])


@pytest.fixture
def warnings(monkeypatch):
    """(level, text) of what the plugin logs."""
    draft_count._warn.cache_clear()
    return messages_of(draft_count, monkeypatch)


@pytest.fixture
def scheduler():
    """One of vLLM's, patched, that remembers what it is given."""

    class Scheduler:
        num_spec_tokens = 2

        def __init__(self, layout):
            setattr(self, LAYOUT, layout)

        def update_draft_token_ids(self, draft_token_ids):
            self.given = draft_token_ids

    draft_count.patch(SimpleNamespace(Scheduler=Scheduler))
    return Scheduler


def test_what_fits_stays_as_it_is(warnings):
    assert draft_count.cut(MANY, 3) is MANY
    assert draft_count.cut(DraftTokenIds([], []), 3).draft_token_ids == []
    assert warnings == []


def test_the_rest_is_dropped_and_told_once(scheduler, warnings):
    found = scheduler("a layout")
    for _ in range(2):
        found.update_draft_token_ids(MANY)
        assert found.given == DraftTokenIds(["a", "b", "c"], [[1, 2], [], [4]])
    ((level, text),) = warnings
    assert level == "WARNING"
    assert text.startswith("a request got 3 drafts, expected at most num_speculative_tokens = 2: ")


def test_without_streaming_heads_nothing_is_dropped(scheduler, warnings):
    found = scheduler(None)
    found.update_draft_token_ids(MANY)
    assert found.given is MANY
    assert warnings == []
