"""The caches that each rank keeps of a layout: tensor-parallel ranks, pipeline stages, or both.

One scheduler makes the block tables of all ranks, so they have the same groups: that of the retrieval
heads and the bins. Which layers have a cache in a group differs from rank to rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vllm_duo.kv_cache.layout import Layout


@dataclass(frozen=True, kw_only=True)
class RankCaches:
    """The caches of one rank.

    A group without heads of this rank has one unused cache of one head, in the rank's first layer:
    vLLM's groups may not be empty. It costs nothing, since some rank has at least as wide a cache
    there and all ranks hold as many blocks. It has the bytes of a head of a layer that is not skipped
    (``KVShape.skipped_layers``), which are the fewest.

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
    caches, own = rank_caches(layout, rank), layout.ranks[rank]
    widest = 0
    for index, group in enumerate(caches.groups):
        is_paged = layout.has_retrieval and index == 0
        if index in caches.unused:
            width = own.token_bytes if is_paged else own.streaming_token_bytes
        elif is_paged:
            width = own.paged_token_bytes
        else:
            width = sum(map(own.ring_layer_bytes, group))
        span = None if is_paged else layout.spans[index - layout.has_retrieval]
        widest = max(widest, width * (layout.block_size if span is None else span.block_size))
    return widest
