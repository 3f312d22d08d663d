"""Our arithmetic of which rank has which KV heads, held against what vLLM's own layer loads."""

from __future__ import annotations

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear

from vllm_duo.kv_cache.ranks import heads_per_rank, own_heads, split_problem

SPLITS = [(1, 1), (8, 1), (8, 2), (8, 4), (8, 8), (2, 4), (2, 8), (1, 8), (32, 8), (4, 16), (6, 3)]
HEAD_SIZE, HIDDEN = 16, 2


def loaded_heads(monkeypatch, num_kv_heads: int, rank: int, ranks: int) -> list[int]:
    """KV heads whose key weights a rank's QKV projection takes from a checkpoint."""
    for module in (linear, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: ranks)
    with set_current_vllm_config(VllmConfig()):
        layer = linear.QKVParallelLinear(
            HIDDEN, HEAD_SIZE, max(num_kv_heads, ranks), num_kv_heads, bias=False
        )
    # Every weight of a head is the head's number.
    keys = torch.arange(num_kv_heads).repeat_interleave(HEAD_SIZE)[:, None].expand(-1, HIDDEN)
    layer.weight_loader(layer.weight, keys.to(layer.weight.dtype), "k")
    own = layer.num_kv_heads * HEAD_SIZE
    first = layer.num_heads * HEAD_SIZE
    rows = layer.weight[first : first + own, 0].view(-1, HEAD_SIZE)
    assert (rows == rows[:, :1]).all()
    return rows[:, 0].int().tolist()


@pytest.mark.parametrize(("num_kv_heads", "ranks"), SPLITS)
def test_a_rank_has_the_heads_that_vllm_loads_there(monkeypatch, num_kv_heads, ranks):
    for rank in range(ranks):
        expected = loaded_heads(monkeypatch, num_kv_heads, rank, ranks)
        assert list(range(num_kv_heads))[own_heads(num_kv_heads, rank, ranks)] == expected
        assert len(expected) == heads_per_rank(num_kv_heads, ranks)


@pytest.mark.parametrize(("num_kv_heads", "ranks"), SPLITS)
def test_these_can_be_split(num_kv_heads, ranks):
    assert split_problem(num_kv_heads, ranks) is None


@pytest.mark.parametrize(("num_kv_heads", "ranks"), [(8, 3), (6, 4), (2, 3), (8, 0), (0, 1)])
def test_others_cannot(num_kv_heads, ranks):
    assert f"{num_kv_heads} KV heads cannot be split over {ranks} ranks" in split_problem(
        num_kv_heads, ranks
    )
