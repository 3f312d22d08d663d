"""What each rank keeps, and what splitting the heads costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vllm_duo import HeadPattern
from vllm_duo.config import DuoConfig, resolve
from vllm_duo.heads.discovery import PUBLISHED, list_shipped
from vllm_duo.kv_cache.layout import KVShape, Layout, plan_layout
from vllm_duo.kv_cache.ranks import stage_sizes
from vllm_duo.kv_cache.tensor_parallel import (
    WORTH_A_HINT,
    SplitCost,
    rank_block_bytes,
    rank_caches,
    replan,
    split_cost,
)
from vllm_duo.server_plan import ServerPlan

TOKENS = 32_768
# Layers by KV heads, true for a retrieval head; two ranks have the left and the right half.
APART = [[1, 1, 0, 0]] * 3  # rank 0 retrieves, rank 1 streams
EXCHANGED = [[1, 1, 0, 0], [0, 0, 1, 1]]
NO_STREAMING_ON_0 = [[1, 1, 0, 1], [1, 1, 0, 0]]
MIXED = [[1, 0, 0, 1], [1, 0, 1, 0]]
MASKS = {
    "apart": APART,
    "exchanged": EXCHANGED,
    "no streaming on rank 0": NO_STREAMING_ON_0,
    "mixed": MIXED,
    "exclusive": [[0] * 4, [1] * 4, [0] * 4],
    "all streaming": [[0] * 4] * 2,
    "all retrieval": [[1] * 4] * 2,
    "one head": [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]],
}


def split(
    mask,
    ranks: int = 2,
    *,
    stages=None,
    block_size: int = 16,
    draft_bytes: int = 0,
    drafts: int = 0,
) -> Layout:
    shapes = KVShape.split(
        [[bool(head) for head in layer] for layer in mask],
        head_size=16,
        dtype_bytes=4,
        tensor_parallel_size=ranks,
        stage_sizes=stages,
        draft_token_bytes=draft_bytes,
    )
    return plan_layout(
        shapes, block_size=block_size, sink_size=16, recent_size=32, draft_size=drafts
    )


def published(
    name: str, ranks: int, *, stages: int = 1, balance: bool = False, block_size: int = 128
):
    """A shipped pattern's plan at 50 %, and its layout in bf16."""
    pattern = HeadPattern.load(PUBLISHED / name)
    sizes = stage_sizes(pattern.num_layers, stages) if stages > 1 else ()
    plan = ServerPlan(pattern, resolve(DuoConfig(balance=balance), pattern, ranks), ranks, sizes)
    shape = {"head_size": 128, "dtype_bytes": 2, "max_model_len": TOKENS}
    return plan, plan.layout(block_size=block_size, **shape)


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


BY_STAGE = [[0] * 4, [0] * 4, [1] * 4, [1] * 4]


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

    def test_a_stage_with_all_of_a_class_decides_the_block(self):
        """4 layers' worth of retrieval heads on one stage, none on the other: half of stock's gain."""
        layout = split(BY_STAGE, 1, stages=(2, 2))
        cost = split_cost(layout, BY_STAGE, TOKENS, 2)
        assert (cost.ranks, cost.stages, cost.retrieval_heads) == (1, 2, (0, 8))
        assert cost.times_stock == pytest.approx(1, abs=0.01)
        assert cost.times_stock_unsplit == pytest.approx(2, abs=0.01)

    @pytest.mark.parametrize("stages", [2, 3, 4])
    @pytest.mark.parametrize("name", list_shipped())
    def test_published_patterns_share_a_table_between_stages(self, name, stages):
        plan, layout = published(name, 2, stages=stages)
        assert len(layout.ranks) == 2 * stages
        assert {tuple(sorted(rank_caches(layout, rank).unused)) for rank in range(2 * stages)} == {
            ()
        }
        cost, _ = plan.split_costs(layout, TOKENS)
        assert cost.stages == stages
        assert cost.times_stock > 1.3

    def test_balance_keeps_its_stages(self):
        plan, layout = published("Meta-Llama-3.1-8B-Instruct", 8, stages=2)
        cost, balanced = plan.split_costs(layout, TOKENS)
        with_it, its_layout = published("Meta-Llama-3.1-8B-Instruct", 8, stages=2, balance=True)
        assert balanced == with_it.split_costs(its_layout, TOKENS)[0]
        assert balanced.stages == cost.stages == 2


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


class TestCost:
    def test_slots_for_drafts_are_compared_with_as_many_on_one_rank(self):
        assert replan(split(MIXED, drafts=7), MIXED, 1) == split(MIXED, 1, drafts=7)

    def test_uneven_ranks_lose(self):
        """6 of 12 heads retrieve, all on one rank: that rank holds as much as stock does."""
        cost = split_cost(split(APART), APART, TOKENS)
        assert cost.retrieval_heads == (0, 6)
        assert cost.times_stock == pytest.approx(1, abs=0.01)
        assert cost.times_stock_unsplit == pytest.approx(2, abs=0.01)
        assert cost.loss == pytest.approx(0.5, abs=0.01)

    def test_even_ranks_lose_nothing(self):
        assert split_cost(split(EXCHANGED), EXCHANGED, TOKENS).loss == 0

    def test_one_rank_loses_nothing(self):
        assert split_cost(split(APART, 1), APART, TOKENS).loss == 0

    def test_a_replanned_layout_is_the_planned_one(self):
        layout = split(MIXED)
        assert replan(layout, MIXED, 2) == layout
        assert replan(layout, MIXED, 1) == split(MIXED, 1)

    @pytest.mark.parametrize("ranks", [2, 4, 8])
    @pytest.mark.parametrize("name", list_shipped())
    def test_balance_loses_no_more_than_rounding(self, name, ranks):
        plan, layout = published(name, ranks, balance=True)
        cost, balanced = plan.split_costs(layout, TOKENS)
        assert abs(cost.loss) < WORTH_A_HINT
        assert balanced is None
        assert len({rank.num_retrieval for rank in layout.ranks}) == 1

    @pytest.mark.parametrize("ranks", [2, 4, 8])
    @pytest.mark.parametrize("name", list_shipped())
    def test_what_balance_would_lose_is_what_it_loses(self, name, ranks):
        plan, layout = published(name, ranks)
        _, balanced = plan.split_costs(layout, TOKENS)
        with_it, its_layout = published(name, ranks, balance=True)
        assert balanced == with_it.split_costs(its_layout, TOKENS)[0]

    def test_llama_31_8b(self):
        """The figures of docs/scale.md."""
        found = {}
        for ranks in (2, 4, 8):
            plan, layout = published("Meta-Llama-3.1-8B-Instruct", ranks)
            cost, _ = plan.split_costs(layout, TOKENS)
            found[ranks] = round(cost.times_stock, 2)
            assert round(cost.times_stock_unsplit, 2) == 1.98
        assert found == {2: 1.89, 4: 1.86, 8: 1.44}

    def test_a_threshold_has_no_balanced_choice(self):
        pattern = HeadPattern.load(PUBLISHED / "Meta-Llama-3.1-8B-Instruct")
        plan = ServerPlan(pattern, resolve(DuoConfig(threshold=0.9), pattern, 2), 2)
        layout = plan.layout(head_size=128, dtype_bytes=2, block_size=16, max_model_len=TOKENS)
        assert plan.split_costs(layout, TOKENS)[1] is None


class TestMessage:
    UNEVEN = SplitCost(
        ranks=4,
        num_tokens=4096,
        retrieval_heads=(3, 5),
        times_stock=1.5,
        times_stock_unsplit=2.0,
    )
    EVEN = SplitCost(
        ranks=4,
        num_tokens=4096,
        retrieval_heads=(4, 4),
        times_stock=1.99,
        times_stock_unsplit=2.0,
    )

    def test_loss_is_told(self):
        assert self.UNEVEN.describe() == (
            "tensor parallelism 4: 3 to 5 retrieval heads a rank; requests of 4096 tokens: 1.50 x "
            "stock on each rank, 2.00 x on a single one, 25.0 % lost"
        )

    @pytest.mark.parametrize(
        ("ranks", "told"),
        [(1, "pipeline parallelism 2: "), (4, "tensor parallelism 4 x pipeline parallelism 2: ")],
    )
    def test_stages_are_told(self, ranks, told):
        assert replace(self.UNEVEN, ranks=ranks, stages=2).describe().startswith(told + "3 to 5 ")

    def test_balance_is_named_where_it_helps(self):
        told = self.UNEVEN.describe(self.EVEN)
        assert told.endswith(
            '25.0 % lost to uneven ranks; "balance": true streams the same share of the heads on every '
            "rank and loses 0.5 %"
        )

    def test_balance_is_not_named_where_it_does_not(self):
        told = self.EVEN.describe(self.EVEN)
        assert "balance" not in told
        assert "4 retrieval heads a rank" in told
