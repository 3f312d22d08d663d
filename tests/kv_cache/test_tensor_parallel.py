"""What each rank keeps, and what splitting the heads costs."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_duo import HeadPattern
from vllm_duo.config import DuoConfig, resolve
from vllm_duo.heads.discovery import PUBLISHED, list_shipped
from vllm_duo.kv_cache.layout import KVShape, Layout, plan_layout
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
    mask, ranks: int = 2, *, block_size: int = 16, draft_bytes: int = 0, drafts: int = 0
) -> Layout:
    shapes = KVShape.split(
        [[bool(head) for head in layer] for layer in mask],
        head_size=16,
        dtype_bytes=4,
        tensor_parallel_size=ranks,
        draft_token_bytes=draft_bytes,
    )
    return plan_layout(
        shapes, block_size=block_size, sink_size=16, recent_size=32, draft_size=drafts
    )


def published(name: str, ranks: int, *, balance: bool = False, block_size: int = 128):
    """A shipped pattern's plan at 50 %, and its layout in bf16."""
    pattern = HeadPattern.load(PUBLISHED / name)
    plan = ServerPlan(pattern, resolve(DuoConfig(balance=balance), pattern, ranks), ranks)
    sizes = {"head_size": 128, "dtype_bytes": 2, "max_model_len": TOKENS}
    return plan, plan.layout(block_size=block_size, **sizes)


class TestRankCaches:
    def test_own_heads_of_each_class(self):
        caches = rank_caches(split(MIXED), 1)
        assert (caches.retrieval, caches.streaming) == ({0: 1, 1: 1}, {0: 1, 1: 1})
        assert not caches.unused

    def test_a_layer_may_have_one_class_on_each_rank(self):
        layout = split(EXCHANGED)
        assert rank_caches(layout, 0).retrieval == {0: 2}
        assert rank_caches(layout, 1).retrieval == {1: 2}

    def test_a_rank_without_retrieval_heads_keeps_their_group(self):
        caches = rank_caches(split(APART), 1)
        assert (caches.retrieval, caches.unused) == ({0: 1}, {0})
        assert caches.streaming == {0: 2, 1: 2, 2: 2}

    def test_a_rank_without_streaming_heads_keeps_every_bin(self):
        layout = split(NO_STREAMING_ON_0)
        caches = rank_caches(layout, 0)
        assert caches.streaming == {layers[0]: 1 for layers in layout.bins}
        assert caches.unused == set(caches.streaming)

    def test_no_group_without_any_heads(self):
        assert rank_caches(split(MASKS["all streaming"]), 1).retrieval == {}
        assert rank_caches(split(MASKS["all retrieval"]), 1).streaming == {}

    @pytest.mark.parametrize("ranks", [1, 2, 4, 8])
    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    def test_no_group_is_empty_and_no_block_wider_than_planned(self, mask, ranks):
        layout = split(mask, ranks)
        for rank in range(ranks):
            caches = rank_caches(layout, rank)
            assert bool(caches.retrieval) == layout.has_retrieval
            assert all(any(layer in caches.streaming for layer in each) for each in layout.bins)
        widths = [rank_block_bytes(layout, rank) for rank in range(ranks)]
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
