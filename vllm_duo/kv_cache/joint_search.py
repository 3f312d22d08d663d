"""Block size and bins of a pool for a model with sliding-window layers of its own.

Beside the pattern's streaming heads there are then the sliding layers', which keep another number of
tokens. Heads of one *kind* keep as many; a bin has heads of one kind. Once a block's bytes are chosen,
each kind can be packed by itself, so the search goes through the bytes that are worth a look and, for
each, through what each kind can make of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from vllm_duo.kv_cache.packing import MAX_BINS, Bins, spread_ranks
from vllm_duo.kv_cache.rounding import cdiv
from vllm_duo.kv_cache.search import Choice
from vllm_duo.kv_cache.shape import KVShape
from vllm_duo.kv_cache.span import StreamingSpan
from vllm_duo.windows import Windows

WINDOW_TOLERANCE = 0.01
"""Held bytes that one bin less may cost, as a share.

More than ``search.HELD_TOLERANCE``: models with sliding-window layers of their own have more bins to
begin with, each costs time in every step, and a window is a large part of what a request holds.
"""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """What all kinds share.

    Attributes:
        unit_bytes: bytes of one token in one unit of a layer's width (``KVShape.streaming_unit``).
        paged_bytes: bytes of a block of the retrieval heads, on the rank where it is widest; 0: none.
        stock_bytes: bytes of a block with all heads paged.
        block_size: tokens of a retrieval block.
        reference_tokens: request length to compare at, in tokens.
        tolerance: held bytes that one bin less may cost, as a share.
        max_bins: most bins of all kinds together.
        bounded: whether no request may hold more than with all heads paged and one block a group.
    """

    unit_bytes: int
    paged_bytes: int
    stock_bytes: int
    block_size: int
    reference_tokens: int
    tolerance: float
    max_bins: int
    bounded: bool


@dataclass(frozen=True)
class Kind:
    """Heads that keep as many tokens.

    Attributes:
        slots: of a request's run, in tokens.
        widths: per rank, such heads of each layer, in units.
    """

    slots: int
    widths: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Packed:
    """One kind in blocks of given bytes.

    Attributes:
        bins: layers of each bin.
        streaming_block: tokens of a block.
        slots: of a run, in tokens.
    """

    bins: Bins
    streaming_block: int
    slots: int

    def blocks(self, num_tokens: int) -> int:
        """Blocks that a request of ``num_tokens`` tokens holds in all of the kind's bins."""
        return len(self.bins) * cdiv(min(num_tokens, self.slots), self.streaming_block)


@dataclass(frozen=True)
class JointChoice:
    """A candidate.

    Attributes:
        block_bytes: of a pool block.
        kinds: how each kind is packed, in the order of the kinds.
        held: bytes of a request of the reference length.
    """

    block_bytes: int
    kinds: tuple[Packed, ...]
    held: int

    @property
    def num_bins(self) -> int:
        """Bins of all kinds."""
        return sum(len(packed.bins) for packed in self.kinds)


def search_windows(
    ranks: Sequence[KVShape],
    block_size: int,
    span: StreamingSpan,
    windows: Windows,
    reference_tokens: int,
) -> Choice:
    """``search.search`` for a model whose layers have windows of their own.

    Args:
        ranks: KV heads by class, of each rank.
        block_size: ``P_r``, in tokens.
        span: what the pattern's streaming heads keep; its ``block_size`` is not read.
        windows: one entry per layer; all heads of a layer with one stream.
        reference_tokens: request length to compare at, in tokens.
    """
    kept = [
        span if window is None else replace(span, sink_size=0, recent_size=window)
        for window in windows
    ]
    kinds: dict[StreamingSpan, Kind] = {}
    for kind in dict.fromkeys([span, *kept]):
        widths = tuple(
            tuple(
                units if own == kind else 0
                for units, own in zip(rank.streaming_units, kept, strict=True)
            )
            for rank in ranks
        )
        if any(map(any, widths)):
            kinds[kind] = Kind(kind.slots, widths)
    paged = max(rank.paged_token_bytes for rank in ranks)
    streaming = max(rank.ring_token_bytes for rank in ranks)
    loads = {
        (rank.paged_token_bytes, *(sum(kind.widths[index]) for kind in kinds.values()))
        for index, rank in enumerate(ranks)
    }
    choice = _search(
        list(kinds.values()),
        Pool(
            unit_bytes=ranks[0].streaming_unit,
            paged_bytes=paged * block_size,
            stock_bytes=(paged + streaming) * block_size,
            block_size=block_size,
            reference_tokens=reference_tokens,
            tolerance=WINDOW_TOLERANCE,
            max_bins=MAX_BINS,
            bounded=len(loads) == 1 and ranks[0].has_one_format,
        ),
    )
    sizes = {kind: packed.streaming_block for kind, packed in zip(kinds, choice.kinds, strict=True)}
    bins = [
        (layers, replace(kind, block_size=sizes[kind]))
        for kind, packed in zip(kinds, choice.kinds, strict=True)
        for layers in packed.bins
    ]
    bins.sort(key=lambda item: item[0])
    return Choice(
        # Without heads of the pattern's that stream, its blocks are of no consequence.
        span=replace(span, block_size=sizes.get(span, 1)),
        bins=tuple(layers for layers, _ in bins),
        block_bytes=choice.block_bytes,
        bin_spans=tuple(own for _, own in bins),
    )


def _search(kinds: Sequence[Kind], pool: Pool) -> JointChoice:
    """The candidate with fewest bins among those of about the least bytes, then that with least bytes.

    As in ``plan_layout``: first come those with which no request holds more than with all heads paged
    and one block a group; where there is none, all are taken.

    Worked example: 12 layers of 16 heads, 10 of which slide over 1,024 tokens while the other two have
    8 retrieval heads and 8 that keep 320 tokens; 128 tokens a block, so a block is 16 * 128 = 2,048
    tokens of a head. The 16 heads that keep 320 have one bin, ``P_s`` 128 and 3 blocks. The 160 that
    slide have one bin with ``P_s`` 12 and 86 blocks, or two of 80 heads with ``P_s`` 25 and 41 each, or
    five of 32 with ``P_s`` 64 and 16 each. With the 256 retrieval blocks of 32,768 tokens that is 345,
    341 or 339: at a tolerance of 1 % two bins are taken, at 0.25 % five.
    """
    packings = [list(_packings(kind, pool.max_bins)) for kind in kinds]
    candidates = [
        choice
        for block_bytes in _worthwhile_bytes(kinds, packings, pool)
        for choice in _candidates(kinds, packings, pool, block_bytes)
    ]
    candidates.sort(key=lambda choice: choice.held)
    within: list[JointChoice] = []
    if pool.bounded:
        for choice in candidates:
            if within and choice.held > within[0].held * (1 + pool.tolerance):
                break
            if _is_within_stock(choice, pool):
                within.append(choice)
    candidates = within or candidates
    most = candidates[0].held * (1 + pool.tolerance)
    return min(
        (choice for choice in candidates if choice.held <= most),
        key=lambda choice: (choice.num_bins, choice.held, choice.block_bytes),
    )


def _packings(kind: Kind, max_bins: int) -> Iterator[tuple[Bins, int]]:
    """The narrowest packing for each number of bins, and the units of its widest bin."""
    widest_layer = max(map(max, kind.widths))
    for num_bins in range(1, min(len(kind.widths[0]), max_bins) + 1):
        bins = spread_ranks(kind.widths, num_bins)
        width = max(sum(rank[layer] for layer in layers) for rank in kind.widths for layers in bins)
        yield bins, width
        if width == widest_layer:
            return  # more bins would be no narrower


def _worthwhile_bytes(
    kinds: Sequence[Kind], packings: Sequence[Sequence[tuple[Bins, int]]], pool: Pool
) -> list[int]:
    """Bytes of a block at which some kind's runs are cut into whole blocks, and the retrieval group's.

    Without retrieval heads a block has about ``block_size`` tokens of all heads of some kind.
    """
    found = {pool.paged_bytes} if pool.paged_bytes else set()
    for kind, packed in zip(kinds, packings, strict=True):
        most = kind.slots if pool.paged_bytes else cdiv(kind.slots, pool.block_size)
        sizes = {cdiv(kind.slots, count) for count in range(1, most + 1)}
        for _, width in packed if pool.paged_bytes else packed[:1]:
            found |= {width * pool.unit_bytes * size for size in sizes}
    least, most = pool.paged_bytes, max(pool.paged_bytes, pool.stock_bytes)
    within = sorted(size for size in found if least <= size <= most)
    return within or [min(found)]


def _candidates(
    kinds: Sequence[Kind],
    packings: Sequence[Sequence[tuple[Bins, int]]],
    pool: Pool,
    block_bytes: int,
) -> Iterator[JointChoice]:
    """What the kinds can make of blocks of so many bytes; none if some layer does not fit one."""
    choices: list[list[Packed]] = []
    for kind, packed in zip(kinds, packings, strict=True):
        useful: list[Packed] = []
        for bins, width in packed:
            streaming_block = min(kind.slots, block_bytes // (width * pool.unit_bytes))
            if streaming_block:
                found = Packed(bins, streaming_block, kind.slots)
                held = found.blocks(pool.reference_tokens)
                if not useful or held < useful[-1].blocks(pool.reference_tokens):
                    useful.append(found)
        choices.append(useful)
    paged = cdiv(pool.reference_tokens, pool.block_size) if pool.paged_bytes else 0
    for together in product(*choices):
        if sum(len(packed.bins) for packed in together) <= pool.max_bins:
            blocks = paged + sum(packed.blocks(pool.reference_tokens) for packed in together)
            yield JointChoice(block_bytes, together, blocks * block_bytes)


def _is_within_stock(choice: JointChoice, pool: Pool) -> bool:
    """Whether no request holds more than with all heads paged and one block a group.

    Worst are the requests whose last token opened a streaming block.
    """
    if choice.block_bytes > pool.stock_bytes:
        return False
    groups = choice.num_bins + bool(pool.paged_bytes)
    lengths = {
        full * packed.streaming_block + 1
        for packed in choice.kinds
        for full in range(cdiv(packed.slots, packed.streaming_block))
    }
    for num_tokens in lengths:
        paged = cdiv(num_tokens, pool.block_size)
        blocks = sum(packed.blocks(num_tokens) for packed in choice.kinds)
        blocks += paged * bool(pool.paged_bytes)
        if (blocks - groups) * choice.block_bytes > paged * pool.stock_bytes:
            return False
    return True
