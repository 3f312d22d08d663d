"""Which KV heads a tensor-parallel rank has: those that vLLM's ``QKVParallelLinear`` gives it.

Source: ``vllm/model_executor/layers/linear.py``.
"""

from __future__ import annotations


def split_problem(num_kv_heads: int, ranks: int) -> str | None:
    """One sentence if a layer's KV heads cannot be split over so many ranks, else None."""
    if ranks < 1 or num_kv_heads < 1 or (num_kv_heads % ranks and ranks % num_kv_heads):
        return (
            f"{num_kv_heads} KV heads cannot be split over {ranks} ranks: expected that one divides "
            "the other; choose another tensor-parallel size"
        )
    return None


def heads_per_rank(num_kv_heads: int, ranks: int) -> int:
    """KV heads of a layer on each rank: with more ranks than heads, one that several share."""
    return max(num_kv_heads // ranks, 1)


def own_heads(num_kv_heads: int, rank: int, ranks: int) -> slice:
    """The KV heads of a layer that lie on a rank.

    KV head ``h`` of ``Hkv`` lies on rank ``h // (Hkv / tp)``; with more ranks than heads, rank ``r``
    has a copy of head ``r * Hkv // tp``.

    Args:
        num_kv_heads: ``Hkv``, of one layer over all ranks.
        rank: from 0.
        ranks: tensor-parallel size; it divides the heads, or they it.

    Worked example: 8 heads on 4 ranks: rank 1 has heads 2 and 3. 2 heads on 8 ranks: ranks 0 to 3
    have head 0, ranks 4 to 7 head 1.
    """
    first = rank * num_kv_heads // ranks
    return slice(first, first + heads_per_rank(num_kv_heads, ranks))
