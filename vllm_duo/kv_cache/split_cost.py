"""What splitting the heads over tensor-parallel ranks and pipeline stages costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_duo.drafts import NO_DRAFTS, Drafts
from vllm_duo.kv_cache.layout import KVShape, Layout, plan_layout

WORTH_A_HINT = 0.01
"""Loss by uneven ranks from which on the log names the setting that avoids it, as a share."""


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
    layout: Layout,
    retrieval: Iterable[Iterable[bool]],
    num_tokens: int,
    stages: int = 1,
    drafts: Drafts = NO_DRAFTS,
) -> SplitCost:
    """What splitting the heads costs, at one request length.

    Args:
        layout: of all ranks.
        retrieval: [L, Hkv], the mask that was split.
        num_tokens: length of the request.
        stages: pipeline-parallel size.
        drafts: that the layout was planned for.
    """
    unsplit = replan(layout, retrieval, 1, drafts=drafts) if len(layout.ranks) > 1 else layout
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
    drafts: Drafts = NO_DRAFTS,
) -> Layout:
    """The layout of a mask over so many ranks, all else as in ``layout``.

    Args:
        layout: whose head size, dtype, block size and span are taken.
        retrieval: [L, Hkv] bool.
        ranks: tensor-parallel size.
        stage_sizes: layers of each pipeline stage; None: one stage.
        drafts: that ``layout`` was planned for.
    """
    own, span = layout.ranks[0], layout.span
    shapes = KVShape.split(
        retrieval,
        head_size=own.head_size,
        dtype_bytes=own.dtype_bytes,
        row_bytes=own.row_bytes,
        streaming_quantised=own.streaming_quantised,
        skipped_layers=own.skipped_layers,
        tensor_parallel_size=ranks,
        draft_token_bytes=drafts.token_bytes(ranks),
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
