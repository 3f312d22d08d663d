"""What splitting the heads over ranks and stages costs, and what the log says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kv_cache.splits import APART, BY_STAGE, EXCHANGED, MIXED, TOKENS, published, split
from vllm_duo import HeadPattern
from vllm_duo.config import DuoConfig, resolve
from vllm_duo.drafts import Drafts
from vllm_duo.heads.discovery import PUBLISHED, list_shipped
from vllm_duo.kv_cache.rank_caches import rank_caches
from vllm_duo.kv_cache.split_cost import WORTH_A_HINT, SplitCost, replan, split_cost
from vllm_duo.server_plan import ServerPlan


class TestCost:
    def test_slots_for_drafts_are_compared_with_as_many_on_one_rank(self):
        assert replan(split(MIXED, drafts=7), MIXED, 1) == split(MIXED, 1, drafts=7)

    def test_a_draft_models_heads_are_split_as_well(self):
        """Two layers of two heads that draft: two heads a rank, and all four on a single one."""
        drafts = Drafts(size=7, num_layers=2, num_kv_heads=2, head_size=32, dtype_bytes=2)
        layout = split(EXCHANGED, drafts=7, draft_bytes=2 * 128)
        assert replan(layout, EXCHANGED, 2, drafts=drafts) == layout
        whole = split(EXCHANGED, 1, drafts=7, draft_bytes=4 * 128)
        assert replan(layout, EXCHANGED, 1, drafts=drafts) == whole
        assert split_cost(layout, EXCHANGED, TOKENS, drafts=drafts).loss == 0

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


class TestStages:
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
