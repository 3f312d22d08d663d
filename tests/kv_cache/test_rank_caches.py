"""The caches that each rank of a split layout keeps."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kv_cache.splits import (
    APART,
    BY_STAGE,
    EXCHANGED,
    MASKS,
    MIXED,
    NO_STREAMING_ON_0,
    split,
)
from vllm_duo import HeadPattern
from vllm_duo.config import DuoConfig, resolve
from vllm_duo.kv_cache.rank_caches import rank_block_bytes, rank_caches
from vllm_duo.kv_cache.shape import KVShape
from vllm_duo.server_plan import ServerPlan


class TestRankCaches:
    def test_own_heads_of_each_class(self):
        caches = rank_caches(split(MIXED), 1)
        assert caches.groups == ({0: 1, 1: 1}, {0: 1, 1: 1})
        assert not caches.unused

    def test_a_layer_may_have_one_class_on_each_rank(self):
        layout = split(EXCHANGED)
        assert rank_caches(layout, 0).groups[0] == {0: 2}
        assert rank_caches(layout, 1).groups[0] == {1: 2}

    def test_a_rank_without_retrieval_heads_keeps_their_group(self):
        caches = rank_caches(split(APART), 1)
        assert (caches.groups[0], caches.unused) == ({0: 1}, {0})
        streaming = {layer: heads for group in caches.groups[1:] for layer, heads in group.items()}
        assert streaming == {0: 2, 1: 2, 2: 2}

    def test_a_rank_without_streaming_heads_keeps_every_bin(self):
        layout = split(NO_STREAMING_ON_0)
        caches = rank_caches(layout, 0)
        assert caches.groups[1:] == ({0: 1},) * len(layout.bins)
        assert caches.unused == set(range(1, layout.num_groups))

    def test_no_group_without_any_heads(self):
        streaming, retrieval = (split(MASKS[name]) for name in ("all streaming", "all retrieval"))
        assert rank_caches(streaming, 1).groups == ({0: 2, 1: 2},)
        assert rank_caches(retrieval, 1).groups == ({0: 2, 1: 2},)

    @pytest.mark.parametrize("ranks", [1, 2, 4, 8])
    @pytest.mark.parametrize("stages", [None, "halves", "uneven"])
    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    def test_no_group_is_empty_and_no_block_wider_than_planned(self, mask, stages, ranks):
        cut = 1 if stages == "uneven" else len(mask) // 2
        layout = split(mask, ranks, stages=stages and (cut, len(mask) - cut))
        assert len(layout.ranks) == ranks * (2 if stages else 1)
        for rank in range(len(layout.ranks)):
            groups = rank_caches(layout, rank).groups
            assert len(groups) == layout.num_groups
            assert all(groups)
        widths = [rank_block_bytes(layout, rank) for rank in range(len(layout.ranks))]
        assert max(widths) == layout.block_bytes

    def test_a_narrow_ranks_blocks_are_narrow(self):
        layout = split([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])  # 6 and 5 retrieval heads
        blocks = [rank_block_bytes(layout, rank) for rank in (0, 1)]
        assert blocks == [6 * 16 * 128, 5 * 16 * 128]
        assert layout.block_bytes == blocks[0]

    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    def test_a_draft_models_layers_are_in_the_first_group(self, mask):
        layout = split(mask, 1, draft_bytes=96)
        assert rank_block_bytes(layout, 0) == layout.block_bytes
        assert not rank_caches(layout, 0).unused


class TestStages:
    """Pipeline parallelism: every stage keeps the groups, with caches of its own layers."""

    def test_a_stage_has_its_own_layers(self):
        layout = split(MIXED * 2, 1, stages=(1, 3))
        assert rank_caches(layout, 0).groups[0] == {0: 2}
        assert rank_caches(layout, 1).groups[0] == {1: 2, 2: 2, 3: 2}

    def test_what_stands_in_for_other_stages_is_in_the_stages_first_layer(self):
        layout = split(BY_STAGE, 1, stages=(2, 2))
        first, second = (rank_caches(layout, stage) for stage in (0, 1))
        assert (first.groups[0], first.unused) == ({0: 1}, {0})
        assert second.groups == ({2: 4, 3: 4}, *({2: 1},) * len(layout.bins))
        assert second.unused == set(range(1, layout.num_groups))

    def test_ranks_are_numbered_stage_by_stage(self):
        shapes = KVShape.split(
            [[True, False], [True, True]],
            head_size=16,
            dtype_bytes=4,
            tensor_parallel_size=2,
            stage_sizes=(1, 1),
        )
        assert [shape.retrieval_heads for shape in shapes] == [(1, 0), (0, 0), (0, 1), (0, 1)]
        assert [shape.streaming_heads for shape in shapes] == [(0, 0), (1, 0), (0, 0), (0, 0)]
        assert [shape.first_layer for shape in shapes] == [0, 0, 1, 1]

    def test_stages_must_have_all_layers(self):
        with pytest.raises(ValueError, match="expected 2 in all, got 3"):
            split([[1], [0]], 1, stages=(1, 2))


class TestMasks:
    @pytest.mark.parametrize("ranks", [1, 2, 4, 8])
    def test_each_rank_has_its_part_of_the_mask(self, ranks):
        pattern = HeadPattern(np.arange(16, dtype=float).reshape(4, 4) / 16)
        plan = ServerPlan(pattern, resolve(DuoConfig(), pattern, ranks), ranks)
        parts = [plan.retrieval_mask(2, rank) for rank in range(ranks)]
        assert {len(part) for part in parts} == {plan.num_rank_heads}
        copies = max(ranks // 4, 1)
        whole = np.concatenate(parts[::copies])
        assert whole.tolist() == plan.resolved.selection.retrieval[2].tolist()
        for rank, part in enumerate(parts):
            assert part.tolist() == parts[rank // copies * copies].tolist()
