"""Layers into bins: which layers' streaming heads share a block table.

A bin is one KV cache group of vLLM's, and every group costs scheduler time, so bins are few; a
bin's width decides how many tokens fit a pool block, so the widest is narrow. Widths are heads, so
small integers: which of them fill a bin exactly is a subset-sum question, answered with one Python
integer as a bit set (bit ``w`` is set iff some layers together are ``w`` heads wide).

All results are deterministic: every process of a server plans on its own and must agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from operator import add, mul, sub

from vllm_duo.kv_cache.rounding import cdiv

Bins = tuple[tuple[int, ...], ...]
"""Per bin, its layer indices in ascending order; bins by their first layer."""

MAX_BINS = 16
"""Most bins of a layout. Each is a KV cache group that the scheduler and the workers walk through
in every step; only patterns with hardly any retrieval heads would fill more."""

MAX_GROUPS = 1 + MAX_BINS
"""Most KV cache groups: that of the retrieval heads and the bins."""

SEARCH_STEPS = 400
"""Partial fillings that ``fit_bins`` tries before it gives a packing up.

Bins of a dozen layers fill exactly at the first try; the search is for bins of two or three wide
layers, where it ends long before this unless there are dozens of such bins.
"""

EXCHANGES = 4_000
"""Exchanges of layers between bins that ``spread_ranks`` looks at."""


def narrowest_bins(widths: Sequence[int], num_bins: int) -> Bins:
    """Pack layers into at most ``num_bins`` bins so that the widest bin is as narrow as it can be.

    Args:
        widths: width of each layer, in heads; layers of width 0 go to no bin.
        num_bins: 1 or more.

    Worked example: widths (3, 0, 2, 1, 2) in two bins are 4 heads each: layers (0, 3) and (2, 4).
    In three bins the widest is layer 0 alone, 3 heads.
    """
    capacity = least_capacity(widths, num_bins)
    sums = subset_sums(widths, sum(widths))
    while True:
        if sums >> capacity & 1:  # no bin is exactly as wide as a width that nothing adds up to
            bins = fit_bins(widths, capacity, num_bins)
            if bins is not None:
                return bins
        capacity += 1


def least_capacity(widths: Sequence[int], num_bins: int) -> int:
    """A width that the widest of ``num_bins`` bins cannot go below, in heads.

    Worked example: widths (3, 0, 2, 1, 2) are 8 heads. Two bins: 8 / 2 = 4. Five bins: the widest
    layer, 3.
    """
    return max(cdiv(sum(widths), num_bins), max(widths, default=0))


def spread_ranks(ranks: Sequence[Sequence[int]], num_bins: int) -> Bins:
    """Like ``narrowest_bins``, for the widths of several tensor-parallel ranks at once.

    All ranks have the same bins, and a bin is as wide as on the rank where it is widest. For ranks
    that are alike the result is that of ``narrowest_bins``; for others it is good but not proven
    best: the widest layers are placed first, each where the bins stay narrowest, then layers are
    moved and exchanged while that evens the bins out.

    Args:
        ranks: per rank, the width of each layer in heads.
        num_bins: 1 or more.

    Worked example: ranks (2, 0, 1, 1) and (0, 2, 1, 1) in two bins: layers 0 and 1 go together (2
    heads on either rank), and so do 2 and 3.
    """
    distinct = sorted(set(map(tuple, ranks)))
    if len(distinct) == 1:
        return narrowest_bins(distinct[0], num_bins)
    widths = list(zip(*distinct, strict=True))
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [[0] * len(distinct) for _ in range(num_bins)]
    for layer in sorted(range(len(widths)), key=lambda at: (-max(widths[at]), -sum(widths[at]))):
        if any(widths[layer]):
            after = [list(map(add, load, widths[layer])) for load in loads]
            best = min(range(num_bins), key=lambda at: (max(after[at]), sum(after[at]), at))
            bins[best].append(layer)
            loads[best] = after[best]
    if num_bins > 1:
        _even_out(bins, loads, widths, max(least_capacity(rank, num_bins) for rank in distinct))
    return tuple(sorted(tuple(sorted(layers)) for layers in bins if layers))


def _even_out(
    bins: list[list[int]], loads: list[list[int]], widths: list[tuple[int, ...]], enough: int
) -> None:
    """Move or exchange layers between bins while the sum of the squared loads falls.

    Args:
        bins: layers of each bin, mutated in place.
        loads: per bin and rank, its width in heads; mutated in place.
        widths: per layer and rank, its width in heads.
        enough: stop once no bin is wider, in heads.
    """
    steps = 0
    improved = True
    nothing = (0,) * len(widths[0])
    while improved and max(map(max, loads)) > enough:
        improved = False
        for one, other in combinations(range(len(bins)), 2):
            gap = list(map(sub, loads[one], loads[other]))
            for mine in [*bins[one], None]:
                for theirs in [*bins[other], None]:
                    steps += 1
                    if steps > EXCHANGES:
                        return
                    out = nothing if mine is None else widths[mine]
                    back = nothing if theirs is None else widths[theirs]
                    change = list(map(sub, out, back))
                    # |one - change|^2 + |other + change|^2 falls iff change . (change - gap) < 0.
                    if sum(map(mul, change, map(sub, change, gap))) >= 0:
                        continue
                    for place, layer, into in ((one, mine, other), (other, theirs, one)):
                        if layer is not None:
                            bins[place].remove(layer)
                            bins[into].append(layer)
                    loads[one] = list(map(sub, loads[one], change))
                    loads[other] = list(map(add, loads[other], change))
                    improved = True
                    break
                if improved:
                    break
            if improved:
                break


def subset_sums(widths: Sequence[int], most: int) -> int:
    """Bit set of the widths, up to ``most``, that some of the layers add up to.

    Worked example: widths (2, 3) and most 5: sums 0, 2, 3 and 5, so the bits 0b101101.
    """
    mask = (1 << (most + 1)) - 1
    sums = 1
    for width in widths:
        sums |= sums << width & mask
    return sums


def fit_bins(widths: Sequence[int], capacity: int, num_bins: int) -> Bins | None:
    """Pack layers into at most ``num_bins`` bins, or None if that cannot be done.

    The next bin always takes the widest layer left and the other layers that fill it best; if the
    last layers then find no room, other fillings are searched, up to ``SEARCH_STEPS`` of them
    (beyond that a packing that exists may be missed).

    Args:
        widths: width of each layer, in heads; layers of width 0 go to no bin.
        capacity: widest allowed bin, in heads.
        num_bins: bins at hand.

    Worked example: widths (3, 0, 2, 1, 2) and capacity 4 fit two bins, (0, 3) and (2, 4); one bin
    is too few.
    """
    if sum(widths) > capacity * num_bins or max(widths, default=0) > capacity:
        return None
    fillings = _fill_best(widths, capacity, num_bins)
    if fillings is None:
        slack = capacity * num_bins - sum(widths)
        fillings = _Search(capacity).place(Counter(filter(None, widths)), num_bins, slack)
    if fillings is None:
        return None
    layers_of: dict[int, list[int]] = {}
    for layer in reversed(range(len(widths))):
        layers_of.setdefault(widths[layer], []).append(layer)
    return tuple(sorted(tuple(sorted(layers_of[w].pop() for w in f)) for f in fillings))


def _fill_best(widths: Sequence[int], capacity: int, num_bins: int) -> list[list[int]] | None:
    """Widths of each bin, every bin filled as far as the layers left allow."""
    left = sorted((width for width in widths if width), reverse=True)
    fillings: list[list[int]] = []
    while left:
        if len(fillings) == num_bins:
            return None
        first, rest = left[0], left[1:]
        room = capacity - first
        mask = (1 << (room + 1)) - 1
        reached = [1]
        for width in rest:
            reached.append(reached[-1] | reached[-1] << width & mask)
        total = reached[-1].bit_length() - 1
        filling, left = [first], []
        for index in reversed(range(len(rest))):  # leaves narrow layers for later bins
            if reached[index] >> total & 1:
                left.append(rest[index])
            else:
                filling.append(rest[index])
                total -= rest[index]
        left.reverse()
        fillings.append(filling)
    return fillings


class _Search:
    """Depth-first search over the fillings of one bin after another, up to ``SEARCH_STEPS``."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.steps = 0

    def place(self, counts: Counter[int], bins: int, slack: int) -> list[list[int]] | None:
        """Widths of each bin, or None.

        Args:
            counts: layers left, by width.
            bins: bins left.
            slack: room that the bins left may leave unused in all, in heads.
        """
        if not counts or not bins:
            return None if counts else []
        first = max(counts)
        rest = counts - Counter([first])
        room = self.capacity - first
        for filling in self.fillings(sorted(rest.items(), reverse=True), room, slack):
            left = rest - Counter(filling)
            others = self.place(left, bins - 1, slack - (room - sum(filling)))
            if others is not None:
                return [[first, *filling], *others]
        return None

    def fillings(self, items: list[tuple[int, int]], room: int, slack: int) -> Iterator[list[int]]:
        """Choices of layers that leave at most ``slack`` of ``room`` unused, wide layers first.

        Args:
            items: (width, layers of that width), widest first.
            room: of the bin, in heads.
            slack: in heads.
        """
        self.steps += 1
        if self.steps > SEARCH_STEPS or sum(w * count for w, count in items) + slack < room:
            return
        if not items:
            yield []
            return
        width, count = items[0]
        for taken in range(min(count, room // width), -1, -1):
            for filling in self.fillings(items[1:], room - taken * width, slack):
                yield [width] * taken + filling
