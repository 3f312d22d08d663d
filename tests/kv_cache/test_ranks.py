"""Which rank has which layers and KV heads, held against vLLM's own division and weight loading."""

from __future__ import annotations

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear

from vllm_duo.kv_cache.ranks import PARTITION, heads_per_rank, own_heads, split_problem, stage_sizes

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


class TestStages:
    @staticmethod
    def of_vllm(num_layers: int, stages: int) -> tuple[int, ...]:
        bounds = [get_pp_indices(num_layers, stage, stages) for stage in range(stages)]
        assert [first for first, _ in bounds] == [0, *(end for _, end in bounds[:-1])]
        return tuple(end - first for first, end in bounds)

    @pytest.mark.parametrize("stages", [1, 2, 3, 4, 5, 8])
    @pytest.mark.parametrize("num_layers", [8, 13, 32, 33, 34, 35, 80])
    def test_a_stage_has_the_layers_that_vllm_puts_there(self, num_layers, stages):
        assert stage_sizes(num_layers, stages) == self.of_vllm(num_layers, stages)

    def test_a_partition_is_vllms(self, monkeypatch):
        monkeypatch.setenv(PARTITION, "3, 4,1")
        assert stage_sizes(8, 3, "3, 4,1") == self.of_vllm(8, 3) == (3, 4, 1)

    @pytest.mark.parametrize("partition", ["4,4", "3,4,2", "8,0,0", "3,4,x", "", "9,-2,1"])
    def test_a_partition_of_other_layers(self, partition):
        with pytest.raises(ValueError, match=f"{PARTITION}: expected 3 numbers of layers, .* 8 in"):
            stage_sizes(8, 3, partition)

    @pytest.mark.parametrize("stages", [0, 9])
    def test_a_stage_without_a_layer(self, stages):
        with pytest.raises(ValueError, match=f"expected 1 to 8, the model's layers, got {stages}"):
            stage_sizes(8, stages)
