"""Where snapshots are taken."""

from __future__ import annotations

import pytest

from vllm_duo.kv_cache.snapshot_policy import Reason, SnapshotPolicy

POLICY = SnapshotPolicy(block_size=16, interval=1_000, answer_interval=40)
PROMPT = 1_500


def points(low, high, branch=0):
    return POLICY.boundaries(low, high, (PROMPT - 1,), branch)


def test_a_prompt_in_one_step():
    assert points(0, 1_488, branch=700) == [
        (688, Reason.BRANCH),
        (1_008, Reason.INTERVAL),
        (1_488, Reason.PROMPT),
    ]


def test_chunks_pass_the_same_boundaries():
    whole = points(0, 1_488, branch=700)
    chunks = [points(low, low + 48, branch=700) for low in range(0, 1_488, 48)]
    assert [point for chunk in chunks for point in chunk] == whole


@pytest.mark.parametrize(("low", "high", "found"), [(1_488, 1_504, []), (1_488, 1_552, [1_536])])
def test_an_answer_every_so_many_whole_blocks(low, high, found):
    assert points(low, high) == [(boundary, Reason.ANSWER) for boundary in found]


def test_of_an_answer_computed_again_only_the_last_counts():
    assert [reason for _, reason in points(0, 1_700)].count(Reason.ANSWER) == 1


def test_a_prompt_shorter_than_a_block_keeps_nothing():
    assert POLICY.boundaries(0, 0, (9,), 0) == []
