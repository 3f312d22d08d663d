"""Which layers a pipeline stage has and which of their KV heads a tensor-parallel rank: as vLLM says.

Source: ``get_pp_indices`` (``vllm/distributed/utils.py``) and ``QKVParallelLinear``
(``vllm/model_executor/layers/linear.py``).
"""

from __future__ import annotations

PARTITION = "VLLM_PP_LAYER_PARTITION"
"""vLLM's environment variable for layers per stage, as in ``18,14``."""


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


def stage_sizes(num_layers: int, stages: int, partition: str | None = None) -> tuple[int, ...]:
    """Layers of each pipeline stage.

    Layers that do not divide go to the stages before the last, one each, from the back.

    Args:
        num_layers: ``L``, of the model.
        stages: pipeline-parallel size.
        partition: the value of ``VLLM_PP_LAYER_PARTITION``, if it is set.

    Raises:
        ValueError: a stage would have no layer, or the partition is not one of these layers.

    Worked example: 32 layers on 3 stages: 11, 11 and 10. 34 layers on 4: 8, 9, 9 and 8.
    """
    if partition is not None:
        try:
            sizes = tuple(int(part) for part in partition.split(","))
        except ValueError:
            sizes = ()
        if len(sizes) != stages or sum(sizes) != num_layers or min(sizes) < 1:
            raise ValueError(
                f"{PARTITION}: expected {stages} numbers of layers, each 1 or more and {num_layers} in "
                f"all, got {partition!r}: correct or unset it"
            )
        return sizes
    if not 1 <= stages <= num_layers:
        raise ValueError(
            f"--pipeline-parallel-size: expected 1 to {num_layers}, the model's layers, got {stages}: "
            "correct it"
        )
    each, rest = divmod(num_layers, stages)
    return tuple(each + (stages - 1 - rest <= stage < stages - 1) for stage in range(stages))
