"""Block size and bins of a pool whose streaming heads all keep as many tokens.

Where a model has sliding-window layers of its own, ``joint_search`` takes this one's place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vllm_duo.kv_cache.packing import MAX_BINS, Bins, least_capacity, spread_ranks
from vllm_duo.kv_cache.rounding import cdiv
from vllm_duo.kv_cache.shape import KVShape
from vllm_duo.kv_cache.span import StreamingSpan

HELD_TOLERANCE = 0.0025
"""Held bytes at the reference length that one bin less may cost, as a share.

Streaming bytes do not grow with the request, so a share of 0.25 % at 32,768 tokens is at most 2 %
at 4,096: the waste there stays within its 3 % with room for the rounding to whole blocks.
"""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a search settles on.

    Attributes:
        span: what the pattern's streaming heads keep, and ``P_s``.
        bins: layers of each bin.
        block_bytes: bytes of a pool block.
        bin_spans: what each bin's heads keep, where that is not ``span`` for all of them; else empty.
    """

    span: StreamingSpan
    bins: Bins
    block_bytes: int
    bin_spans: tuple[StreamingSpan, ...] = ()


def search(
    ranks: Sequence[KVShape], block_size: int, span: StreamingSpan, reference_tokens: int
) -> Choice:
    """The best of all layouts, as ``plan_layout`` describes it.

    Args:
        ranks: KV heads by class, of each rank.
        block_size: ``P_r``, in tokens.
        span: what the streaming heads keep; its ``block_size`` is not read.
        reference_tokens: request length to compare at, in tokens.
    """
    found = _Search(ranks, block_size, span.slots, reference_tokens).best()
    return Choice(
        span=replace(span, block_size=found.streaming_block),
        bins=found.bins,
        block_bytes=found.block_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A candidate: the bytes of its blocks, and those held at the reference length."""

    bins: Bins
    streaming_block: int
    block_bytes: int
    held: int


class _Search:
    """All layouts worth a look.

    For a number of bins only the narrowest packing counts, since its blocks hold most tokens; for
    blocks as wide as the retrieval group only the largest ``P_s``. Wider blocks are tried too: they
    pay where retrieval heads are few.
    """

    def __init__(
        self, ranks: Sequence[KVShape], block_size: int, slots: int, reference_tokens: int
    ) -> None:
        # Widths of layers are counted in units: heads, where a token has as many bytes in all of them.
        self.streaming = [rank.streaming_units for rank in ranks]
        self.unit_bytes = ranks[0].streaming_unit
        self.most_streaming = max(map(sum, self.streaming))
        totals = {(rank.paged_token_bytes, rank.ring_token_bytes) for rank in ranks}
        self.is_bounded = len(totals) == 1 and ranks[0].has_one_format
        self.block_size = block_size
        self.slots = slots
        self.reach = min(slots, reference_tokens)
        self.retrieval_blocks = cdiv(reference_tokens, block_size)
        # Bytes of a block of the retrieval group, and of all heads' as stock has it, but for the dtype
        # of streaming heads where they keep their own.
        self.retrieval_width = max(rank.paged_token_bytes for rank in ranks) * block_size
        streaming_width = self.most_streaming * self.unit_bytes * block_size
        self.stock_width = self.retrieval_width + streaming_width
        self.widest_layer = max(max(widths, default=0) for widths in self.streaming)

    def best(self) -> _Candidate:
        """The candidate to take, as ``plan_layout`` describes it."""
        if not self.retrieval_width or not self.most_streaming:
            return self._of_one_class()
        within: list[_Candidate] = []
        others: list[_Candidate] = []
        least = sys.maxsize
        for num_bins in range(1, min(len(self.streaming[0]), MAX_BINS) + 1):
            narrowest = max(least_capacity(widths, num_bins) for widths in self.streaming)
            if self._least_held(num_bins, narrowest) >= least:
                continue
            bins = spread_ranks(self.streaming, num_bins)
            for choice in self._candidates(bins):
                if choice.held > least * (1 + HELD_TOLERANCE):
                    continue
                if not self.is_bounded or self._is_within_stock(choice):
                    within.append(choice)
                    least = min(least, choice.held)
                else:
                    others.append(choice)
            if self._width(bins) == self.widest_layer:
                break  # more bins would be no narrower
        candidates = within or others
        most = min(choice.held for choice in candidates) * (1 + HELD_TOLERANCE)
        return min(
            (choice for choice in candidates if choice.held <= most),
            key=lambda choice: (len(choice.bins), choice.held, -choice.streaming_block),
        )

    def _of_one_class(self) -> _Candidate:
        """One bin of all layers, or none; a run of as many blocks as stock's, and evenly cut.

        Worked example: no retrieval heads, 320 slots, ``P_r`` 128: 3 blocks of 107 tokens.
        """
        streaming_block = cdiv(self.slots, cdiv(self.slots, self.block_size))
        bins = spread_ranks(self.streaming, 1) if self.most_streaming else ()
        width = max(self.retrieval_width, self.most_streaming * self.unit_bytes * streaming_block)
        return _Candidate(bins=bins, streaming_block=streaming_block, block_bytes=width, held=0)

    def _width(self, bins: Bins) -> int:
        """Units of the widest bin, on the rank where it is widest."""
        return max(
            sum(widths[layer] for layer in layers) for widths in self.streaming for layers in bins
        )

    def _candidates(self, bins: Bins) -> Iterator[_Candidate]:
        """Every ``P_s`` for these bins, from the largest that needs no wider blocks."""
        width = self._width(bins) * self.unit_bytes
        first = min(self.slots, self.retrieval_width // width)
        last = min(self.slots, self.stock_width // width)
        for streaming_block in range(max(first, 1), max(first, last, 1) + 1):
            block_bytes = max(self.retrieval_width, width * streaming_block)
            blocks = self.retrieval_blocks + len(bins) * cdiv(self.reach, streaming_block)
            yield _Candidate(
                bins=bins,
                streaming_block=streaming_block,
                block_bytes=block_bytes,
                held=blocks * block_bytes,
            )

    def _least_held(self, num_bins: int, narrowest: int) -> int:
        """What a request holds at least, if no bin can be narrower than ``narrowest`` units."""
        wider = (self.retrieval_width // self.unit_bytes + 1) * self.unit_bytes
        token_bytes = narrowest * self.unit_bytes
        bound = self.retrieval_blocks * wider + num_bins * max(token_bytes * self.reach, wider)
        streaming_block = min(self.slots, self.retrieval_width // token_bytes)
        if not streaming_block:
            return bound
        blocks = self.retrieval_blocks + num_bins * cdiv(self.reach, streaming_block)
        return min(bound, blocks * self.retrieval_width)

    def _is_within_stock(self, choice: _Candidate) -> bool:
        """Whether no request holds more than stock vLLM's and one block a group.

        Worst are the requests whose last token opened a streaming block: between two of them, and
        beyond the run, stock grows at least as fast.
        """
        if choice.block_bytes > self.stock_width:
            return False
        groups = 1 + len(choice.bins)
        for full in reversed(range(cdiv(self.slots, choice.streaming_block))):
            paged = full * choice.streaming_block // self.block_size + 1
            held = (paged + len(choice.bins) * (full + 1) - groups) * choice.block_bytes
            if held > paged * self.stock_width:
                return False
        return True
