"""What each rank keeps of a layout, and what splitting the heads over ranks and stages costs.

One scheduler makes the block tables of all ranks, so they have the same groups: that of the retrieval
heads and the bins. Which layers have a cache in a group differs from rank to rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vllm_duo.kv_cache.layout import KVShape, Layout, plan_layout

WORTH_A_HINT = 0.01
"""Loss by uneven ranks from which on the log names the setting that avoids it, as a share."""


@dataclass(frozen=True, kw_only=True)
class RankCaches:
    """The caches of one rank.

    A group without heads of this rank has one unused cache of one head, in the rank's first layer:
    vLLM's groups may not be empty. It costs nothing, since some rank has at least as wide a cache
    there and all ranks hold as many blocks.

    Attributes:
        groups: the heads of each cache by layer, of each KV cache group: that of the retrieval heads,
            if any rank has some, then the bins.
        unused: the groups, by index, whose only cache stands in for heads of other ranks.
    """

    groups: tuple[Mapping[int, int], ...]
    unused: frozenset[int]


def rank_caches(layout: Layout, rank: int) -> RankCaches:
    """The caches that a rank keeps.

    Args:
        layout: of all ranks.
        rank: from 0, as in ``layout.ranks``.

    Worked examples. Tensor parallelism, two layers whose heads all lie on rank 0 if they stream and
    on rank 1 if they do not: rank 0 has two streaming caches and an unused retrieval cache in layer 0,
    rank 1 two retrieval caches and, for each bin, an unused streaming cache in layer 0. Pipeline
    parallelism, layers 0 and 1 stream and 2 and 3 do not, two stages of two layers: stage 0 has two
    streaming caches and an unused retrieval cache in layer 0, stage 1 two retrieval caches and, for
    each bin, an unused streaming cache in layer 2.
    """
    own = layout.ranks[rank]
    groups = [_heads(own.streaming_heads, layers) for layers in layout.bins]
    if layout.has_retrieval:
        groups.insert(0, _heads(own.retrieval_heads, range(len(own.retrieval_heads))))
    unused = frozenset(
        index
        for index, group in enumerate(groups)
        if not group and not (index == 0 and layout.has_retrieval and own.draft_token_bytes)
    )
    for index in unused:
        groups[index] = {own.first_layer: 1}
    return RankCaches(groups=tuple(groups), unused=unused)


def _heads(heads: Sequence[int], layers: Iterable[int]) -> dict[int, int]:
    return {layer: heads[layer] for layer in layers if heads[layer]}


def rank_block_bytes(layout: Layout, rank: int) -> int:
    """Bytes of a pool block on one rank: its widest group's; ``layout.block_bytes`` on the widest rank.

    Worked example: 3 retrieval heads on rank 0 and 5 on rank 1, 16 tokens a block and narrow bins: 48
    and 80 tokens of a head.
    """
    groups, own = rank_caches(layout, rank).groups, layout.ranks[rank]
    widths = [sum(group.values()) * own.token_bytes for group in groups]
    tokens = [span.block_size for span in layout.spans]
    if layout.has_retrieval:
        widths[0] += own.draft_token_bytes
        tokens.insert(0, layout.block_size)
    return max(width * size for width, size in zip(widths, tokens, strict=True))


@dataclass(frozen=True, kw_only=True)
class SplitCost:
    """What a request takes on each of several ranks, against the same heads on one rank.

    Attributes:
        ranks: tensor-parallel size.
        stages: pipeline-parallel size.
        num_tokens: length of the request.
        retrieval_heads: of the rank with fewest and of that with most, over all layers.
        times_stock: bytes of stock vLLM over those of the layout, on each rank.
        times_stock_unsplit: the same on one rank.
    """

    ranks: int
    stages: int = 1
    num_tokens: int
    retrieval_heads: tuple[int, int]
    times_stock: float
    times_stock_unsplit: float

    @property
    def loss(self) -> float:
        """Share of ``times_stock_unsplit`` that is lost; below 0 where the split layout fits better."""
        return 1.0 - self.times_stock / self.times_stock_unsplit

    def describe(self, balanced: SplitCost | None = None) -> str:
        """One sentence for the log.

        Args:
            balanced: the cost of a selection that streams the same share on every rank; None where
                that is no choice or this is it.
        """
        least, most = self.retrieval_heads
        heads = f"{most}" if least == most else f"{least} to {most}"
        sizes = {"tensor": self.ranks, "pipeline": self.stages}
        split = " x ".join(f"{kind} parallelism {size}" for kind, size in sizes.items() if size > 1)
        text = (
            f"{split}: {heads} retrieval heads a rank; requests of {self.num_tokens} tokens: "
            f"{self.times_stock:.2f} x stock on each rank, {self.times_stock_unsplit:.2f} x on a "
            f"single one, {_percent(self.loss)} lost"
        )
        if balanced is None or self.loss - balanced.loss < WORTH_A_HINT:
            return text
        return (
            f'{text} to uneven ranks; "balance": true streams the same share of the heads on every '
            f"rank and loses {_percent(balanced.loss)}"
        )


def split_cost(
    layout: Layout, retrieval: Iterable[Iterable[bool]], num_tokens: int, stages: int = 1
) -> SplitCost:
    """What splitting the heads costs, at one request length.

    Args:
        layout: of all ranks.
        retrieval: [L, Hkv], the mask that was split.
        num_tokens: length of the request.
        stages: pipeline-parallel size.
    """
    unsplit = replan(layout, retrieval, 1) if len(layout.ranks) > 1 else layout
    heads = [rank.num_retrieval for rank in layout.ranks]
    return SplitCost(
        ranks=len(layout.ranks) // stages,
        stages=stages,
        num_tokens=num_tokens,
        retrieval_heads=(min(heads), max(heads)),
        times_stock=layout.times_stock(num_tokens),
        times_stock_unsplit=unsplit.times_stock(num_tokens),
    )


def replan(
    layout: Layout,
    retrieval: Iterable[Iterable[bool]],
    ranks: int,
    stage_sizes: Sequence[int] | None = None,
) -> Layout:
    """The layout of a mask over so many ranks, all else as in ``layout``.

    Args:
        layout: whose head size, dtype, block size and span are taken.
        retrieval: [L, Hkv] bool.
        ranks: tensor-parallel size.
        stage_sizes: layers of each pipeline stage; None: one stage.
    """
    own, span = layout.ranks[0], layout.span
    assert not own.draft_token_bytes, "a draft model is not split over ranks"
    shapes = KVShape.split(
        retrieval,
        head_size=own.head_size,
        dtype_bytes=own.dtype_bytes,
        row_bytes=own.row_bytes,
        tensor_parallel_size=ranks,
        stage_sizes=stage_sizes,
    )
    return plan_layout(
        shapes,
        block_size=layout.block_size,
        sink_size=span.sink_size,
        recent_size=span.recent_size,
        draft_size=span.draft_size,
        windows=layout.windows,
    )


def _percent(share: float) -> str:
    return f"{100 * max(share, 0.0):.1f} %"
