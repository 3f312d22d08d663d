"""What each tensor-parallel rank keeps of a layout, and what splitting the heads costs.

One scheduler makes the block tables of all ranks, so they have the same groups: that of the retrieval
heads and the bins. Which layers have a cache in a group differs from rank to rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vllm_duo.kv_cache.layout import KVShape, Layout, plan_layout

WORTH_A_HINT = 0.01
"""Loss by uneven ranks from which on the log names the setting that avoids it, as a share."""


@dataclass(frozen=True, kw_only=True)
class RankCaches:
    """The caches of one rank, each with its KV heads, by layer.

    A group without heads of this rank has one unused cache of one head: vLLM's groups may not be
    empty. It costs nothing, since some rank has at least as wide a cache there and all ranks hold as
    many blocks.

    Attributes:
        retrieval: heads of the layers' retrieval caches.
        streaming: heads of the layers' streaming caches.
        unused: layers whose cache stands in for a group's heads, which lie on other ranks.
    """

    retrieval: Mapping[int, int]
    streaming: Mapping[int, int]
    unused: frozenset[int]


def rank_caches(layout: Layout, rank: int) -> RankCaches:
    """The caches that a rank keeps.

    Args:
        layout: of all ranks.
        rank: from 0.

    Worked example: two layers whose heads all lie on rank 0 if they stream and on rank 1 if they do
    not. Rank 0 has two streaming caches and an unused retrieval cache in layer 0, rank 1 two retrieval
    caches and, for each bin, an unused streaming cache in the bin's first layer.
    """
    own = layout.ranks[rank]
    retrieval = {layer: heads for layer, heads in enumerate(own.retrieval_heads) if heads}
    streaming = {layer: heads for layer, heads in enumerate(own.streaming_heads) if heads}
    unused: set[int] = set()
    if layout.has_retrieval and not retrieval and not own.draft_token_bytes:
        retrieval = {_first_retrieval_layer(layout): 1}
        unused.update(retrieval)
    for layers in layout.bins:
        if not any(layer in streaming for layer in layers):
            streaming[layers[0]] = 1
            unused.add(layers[0])
    return RankCaches(retrieval=retrieval, streaming=streaming, unused=frozenset(unused))


def rank_block_bytes(layout: Layout, rank: int) -> int:
    """Bytes of a pool block on one rank: its widest group's; ``layout.block_bytes`` on the widest rank.

    Worked example: 3 retrieval heads on rank 0 and 5 on rank 1, 16 tokens a block and narrow bins: 48
    and 80 tokens of a head.
    """
    caches, own = rank_caches(layout, rank), layout.ranks[rank]
    paged = sum(caches.retrieval.values()) * own.token_bytes + own.draft_token_bytes
    widths = [paged * layout.block_size]
    for layers in layout.bins:
        heads = sum(caches.streaming.get(layer, 0) for layer in layers)
        widths.append(heads * own.token_bytes * layout.span.block_size)
    return max(widths)


@dataclass(frozen=True, kw_only=True)
class SplitCost:
    """What a request takes on each of several ranks, against the same heads on one rank.

    Attributes:
        ranks: tensor-parallel size.
        num_tokens: length of the request.
        retrieval_heads: of the rank with fewest and of that with most, over all layers.
        times_stock: bytes of stock vLLM over those of the layout, on each rank.
        times_stock_unsplit: the same on one rank.
    """

    ranks: int
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
        text = (
            f"tensor parallelism {self.ranks}: {heads} retrieval heads a rank; requests of "
            f"{self.num_tokens} tokens: {self.times_stock:.2f} x stock on each rank, "
            f"{self.times_stock_unsplit:.2f} x on a single one, {_percent(self.loss)} lost"
        )
        if balanced is None or self.loss - balanced.loss < WORTH_A_HINT:
            return text
        return (
            f'{text} to uneven ranks; "balance": true streams the same share of the heads on every '
            f"rank and loses {_percent(balanced.loss)}"
        )


def split_cost(layout: Layout, retrieval: Iterable[Iterable[bool]], num_tokens: int) -> SplitCost:
    """What splitting the heads costs, at one request length.

    Args:
        layout: of all ranks.
        retrieval: [L, Hkv], the mask that was split.
        num_tokens: length of the request.
    """
    unsplit = replan(layout, retrieval, 1) if len(layout.ranks) > 1 else layout
    heads = [rank.num_retrieval for rank in layout.ranks]
    return SplitCost(
        ranks=len(layout.ranks),
        num_tokens=num_tokens,
        retrieval_heads=(min(heads), max(heads)),
        times_stock=layout.times_stock(num_tokens),
        times_stock_unsplit=unsplit.times_stock(num_tokens),
    )


def replan(layout: Layout, retrieval: Iterable[Iterable[bool]], ranks: int) -> Layout:
    """The layout of a mask over so many ranks, all else as in ``layout``.

    Args:
        layout: whose head size, dtype, block size and span are taken.
        retrieval: [L, Hkv] bool.
        ranks: tensor-parallel size.
    """
    own, span = layout.ranks[0], layout.span
    assert not own.draft_token_bytes, "a draft model is not split over ranks"
    shapes = KVShape.split(
        retrieval,
        head_size=own.head_size,
        dtype_bytes=own.dtype_bytes,
        row_bytes=own.row_bytes,
        tensor_parallel_size=ranks,
    )
    return plan_layout(
        shapes,
        block_size=layout.block_size,
        sink_size=span.sink_size,
        recent_size=span.recent_size,
        draft_size=span.draft_size,
    )


def _percent(share: float) -> str:
    return f"{100 * max(share, 0.0):.1f} %"


def _first_retrieval_layer(layout: Layout) -> int:
    return next(
        layer
        for layer, heads in enumerate(zip(*(r.retrieval_heads for r in layout.ranks), strict=True))
        if any(heads)
    )
