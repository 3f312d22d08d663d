"""The layers of all ranks and stages, made one after another here, before vLLM's own grouping."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.utils import get_pp_indices
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.utils import (
    get_supported_kv_cache_layouts,
    resolve_kv_cache_layout,
)
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tests.this_process import this_process  # noqa: F401 - a fixture
from vllm_duo import HeadPattern
from vllm_duo.attention import specs
from vllm_duo.attention.backend import DuoAttentionBackend
from vllm_duo.attention.sibling_cache import UNUSED_SUFFIX
from vllm_duo.compat.pool_report import check_and_report, check_groups
from vllm_duo.drafts import Drafts
from vllm_duo.heads.discovery import PUBLISHED, list_shipped
from vllm_duo.kv_cache.formats import row_bytes
from vllm_duo.kv_cache.layout import Layout
from vllm_duo.kv_cache.rank_caches import rank_block_bytes
from vllm_duo.kv_cache.spec import RetrievalSpec, StreamingSpec

HEAD_SIZE = 16
POOL_BYTES = 2**28
MASKS = {
    "mixed": [[1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 1, 0]],
    "exclusive": [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]],
    "retrieval on the first ranks alone": [[1, 1, 0, 0]] * 3,
    "streaming on the first ranks alone": [[0, 0, 1, 1]] * 3,
    "each layer of one class on each rank": [[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]],
    "one retrieval head": [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]],
    "one streaming head": [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]],
    "all streaming": [[0, 0, 0, 0]] * 3,
    "all retrieval": [[1, 1, 1, 1]] * 3,
}


@dataclass(frozen=True)
class Split:
    """A server's config, its plan, and what every rank says of its caches.

    ``rank_specs`` and ``heads`` are by rank, stage by stage; ``heads`` by a stage's layers.
    """

    config: object
    layout: Layout
    mask: np.ndarray
    rank_specs: list[dict]
    heads: list[dict]
    tensor_parallel_size: int

    @property
    def ranks(self) -> int:
        return len(self.rank_specs)

    def configs(self, pools: list[int] | None = None) -> list[KVCacheConfig]:
        """vLLM's own grouping and sizing of all ranks' caches."""
        return kv_cache_utils.get_kv_cache_configs(
            self.config, self.rank_specs, pools or [POOL_BYTES] * self.ranks
        )


@pytest.fixture
def split(tmp_path, monkeypatch):
    """Makes the attention layers of all ranks as a model's constructor and loader do."""

    def split(mask, ranks, stages=1, drafts=0, cache="auto", skipped=(), **duo) -> Split:
        mask = np.asarray(mask, dtype=bool)
        layers, kv_heads = mask.shape
        heads = max(kv_heads, ranks) * 2
        HeadPattern(mask.astype(float)).save(tmp_path / "duo_pattern")
        config_json = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": heads * HEAD_SIZE,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": HEAD_SIZE,
            "vocab_size": 64,
            "max_position_embeddings": 4096,
        }
        (tmp_path / "config.json").write_text(json.dumps(config_json))
        section = {"threshold": 0.5} | duo
        ngram = {"method": "ngram", "num_speculative_tokens": drafts}
        config = EngineArgs(
            model=str(tmp_path),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="float32",
            block_size=16,
            attention_backend="duo",
            tensor_parallel_size=ranks,
            additional_config={"duo": {k: v for k, v in section.items() if v is not None}},
            speculative_config=ngram if drafts else None,
            kv_cache_dtype=cache,
            kv_cache_dtype_skip_layers=list(skipped),
        ).create_engine_config()
        # Set once the start check, which refuses stages on CPUs, has passed.
        config.parallel_config.pipeline_parallel_size = stages
        context = config.compilation_config.static_forward_context
        rank_specs, heads_by_rank = [], []
        for stage, rank in product(range(stages), range(ranks)):
            monkeypatch.setattr(specs, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
            group = SimpleNamespace(rank_in_group=stage)
            monkeypatch.setattr(specs, "get_pp_group", lambda group=group: group)
            context.clear()
            with set_current_vllm_config(config):
                made = {
                    layer: Attention(
                        heads // ranks,
                        HEAD_SIZE,
                        1.0,
                        max(kv_heads // ranks, 1),
                        cache_config=config.cache_config,
                        prefix=f"model.layers.{layer}.self_attn.attn",
                    )
                    for layer in range(*get_pp_indices(layers, stage, stages))
                }
            for layer in made.values():
                layer.process_weights_after_loading(torch.float32)
            runner = SimpleNamespace(vllm_config=config, shared_kv_cache_layers={})
            rank_specs.append(GPUModelRunner.get_kv_cache_spec(runner))
            heads_by_rank.append({layer: each.impl.heads for layer, each in made.items()})
            assert all(context[layer.layer_name] is layer for layer in made.values())
        supported = [found.name for found in get_supported_kv_cache_layouts([DuoAttentionBackend])]
        resolve_kv_cache_layout(config, [supported], rank_specs[0].values())
        layout = specs.plan_of(config).layout(
            head_size=HEAD_SIZE,
            dtype_bytes=4,
            row_bytes=row_bytes(cache, HEAD_SIZE),
            block_size=16,
            max_model_len=4096,
            drafts=Drafts.of(config),
        )
        return Split(config, layout, mask, rank_specs, heads_by_rank, ranks)

    return split


def check_caches(config: KVCacheConfig, own: dict) -> None:
    """Every cache of a rank has room of its own in a group's block, and there are no others."""
    assert sorted(name for group in config.kv_cache_groups for name in group.layer_names) == (
        sorted(own)
    )
    for group in config.kv_cache_groups:
        taken = []
        for tensor in config.kv_cache_tensors:
            for position, name in enumerate(tensor.layers):
                if name in group.layer_names:
                    start = tensor.offset + position * own[name].page_size_bytes
                    taken.append((start, start + own[name].page_size_bytes))
        assert len(taken) == len(group.layer_names)
        taken.sort()
        assert all(end <= start for (_, end), (start, _) in pairwise(taken))
        assert taken[-1][1] <= config.kv_cache_tensors[0].size // config.num_blocks


def check(found: Split) -> None:
    """vLLM makes of all ranks' caches what the layout planned for each of them."""
    configs = found.configs()
    num_blocks = found.layout.num_blocks(POOL_BYTES)
    for rank, (config, own) in enumerate(zip(configs, found.rank_specs, strict=True)):
        assert config.num_blocks == num_blocks
        assert len(config.kv_cache_groups) == found.layout.num_groups
        check_groups(found.layout, config, rank)
        check_caches(config, own)
        assert {tensor.size for tensor in config.kv_cache_tensors} == {
            num_blocks * rank_block_bytes(found.layout, rank)
        }


def check_heads(found: Split) -> None:
    """Every rank's caches have its heads of each class; unused ones have one head."""
    kv_heads = found.mask.shape[1]
    ranks = found.tensor_parallel_size
    size = max(kv_heads // ranks, 1)
    assert sorted(layer for heads in found.heads[::ranks] for layer in heads) == (
        list(range(len(found.mask)))
    )
    for rank, own in enumerate(found.rank_specs):
        first = rank % ranks * kv_heads // ranks
        for layer, heads in found.heads[rank].items():
            row = found.mask[layer, first : first + size]
            assert heads.retrieval.tolist() == np.flatnonzero(row).tolist()
            assert heads.streaming.tolist() == np.flatnonzero(~row).tolist()
            for kind, number in ((RetrievalSpec, row.sum()), (StreamingSpec, (~row).sum())):
                used = [
                    spec.num_kv_heads
                    for name, spec in own.items()
                    if extract_layer_index(name) == layer
                    and isinstance(spec, kind)
                    and UNUSED_SUFFIX not in name
                ]
                assert used == [number] * bool(number)
        unused = [spec for name, spec in own.items() if UNUSED_SUFFIX in name]
        assert all(spec.num_kv_heads == 1 for spec in unused)
        assert {extract_layer_index(name) for name in own} == set(found.heads[rank])


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_vllm_groups_all_ranks_as_planned(split, mask, ranks):
    found = split(mask, ranks)
    check_heads(found)
    check(found)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", list_shipped())
def test_a_published_pattern(split, name, ranks):
    mask = HeadPattern.load(PUBLISHED / name).select(sparsity=0.5).retrieval
    found = split(mask, ranks)
    check_heads(found)
    check(found)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_vllm_groups_all_stages_as_planned(split, mask, ranks, stages):
    found = split(mask, ranks, stages)
    assert found.ranks == ranks * stages
    check_heads(found)
    check(found)


@pytest.mark.parametrize(("ranks", "stages"), [(1, 2), (1, 4), (2, 2), (4, 2)])
@pytest.mark.parametrize("name", list_shipped())
def test_a_published_pattern_in_stages(split, name, ranks, stages):
    mask = HeadPattern.load(PUBLISHED / name).select(sparsity=0.5).retrieval
    found = split(mask, ranks, stages)
    check_heads(found)
    check(found)


@pytest.mark.parametrize(("ranks", "stages"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("skipped", [["0"], ["1", "2"]], ids=" ".join)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_layers_that_keep_the_models_dtype(split, mask, skipped, ranks, stages):
    """Beside others in int8; what stands in for heads of other ranks is quantised in any layer."""
    form = "int8_per_token_head"
    found = split(mask, ranks, stages, cache=form, skipped=skipped)
    check_heads(found)
    check(found)
    row = row_bytes(form, HEAD_SIZE)
    for own in found.rank_specs:
        for name, spec in own.items():
            is_skipped = str(extract_layer_index(name)) in skipped and UNUSED_SUFFIX not in name
            token = 2 * HEAD_SIZE * 4 if is_skipped else row
            slots = spec.block_size if isinstance(spec, RetrievalSpec) else spec.slots_per_block
            assert spec.page_size_bytes == spec.num_kv_heads * slots * token
    config = kv_cache_utils.generate_scheduler_kv_cache_config(found.configs())
    if found.layout.bins:
        assert check_and_report(found.config, config) == found.layout


def test_a_partition_of_the_users(split, monkeypatch):
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,2")
    found = split(MASKS["mixed"], 1, 2)
    assert [list(heads) for heads in found.heads] == [[0], [1, 2]]
    check_heads(found)
    check(found)


def test_each_bin_without_heads_of_a_rank_has_a_cache_of_its_own(split, monkeypatch):
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "6,2")
    found = split([[0, 0, 0, 0]] * 7 + [[1, 1, 0, 0]], 2, 2)
    assert len(found.layout.bins) == 3
    unused = [
        sorted(
            spec.bin for name, spec in own.items() if UNUSED_SUFFIX in name and hasattr(spec, "bin")
        )
        for own in found.rank_specs
    ]
    assert unused == [[], [], [0, 1], [1]]
    check_heads(found)
    check(found)


def test_stages_of_unequal_memory_have_equal_pools(split):
    found = split(MASKS["exclusive"], 1, 3)
    configs = found.configs([POOL_BYTES, POOL_BYTES, POOL_BYTES // 4])
    expected = POOL_BYTES // 4 // rank_block_bytes(found.layout, 2)
    assert {config.num_blocks for config in configs} == {
        min(expected, found.layout.num_blocks(POOL_BYTES))
    }


def test_scheduler_gets_the_groups_of_all_stages(split):
    """What it sees is the first stage's, which has no retrieval heads here."""
    found = split(MASKS["exclusive"], 1, 3)
    config = kv_cache_utils.generate_scheduler_kv_cache_config(found.configs())
    layout = check_and_report(found.config, config)
    assert layout == found.layout
    assert len(config.kv_cache_groups) == layout.num_groups
    kinds = [type(group.kv_cache_spec) for group in config.kv_cache_groups]
    assert kinds == [RetrievalSpec, *[StreamingSpec] * len(layout.bins)]
    assert [group.kv_cache_spec.bin for group in config.kv_cache_groups[1:]] == (
        list(range(len(layout.bins)))
    )


def test_groups_without_heads_of_a_rank_have_an_unused_cache_there(split):
    found = split(MASKS["retrieval on the first ranks alone"], 2)
    first, second = ({name for name in own if UNUSED_SUFFIX in name} for own in found.rank_specs)
    assert len(first) == len(found.layout.bins)
    assert len(second) == 1


def test_no_name_is_on_two_ranks(split):
    found = split(MASKS["mixed"], 4)
    names = [name for own in found.rank_specs for name in own]
    assert len(names) == len(set(names))


def test_one_rank_keeps_the_models_names(split):
    found = split(MASKS["mixed"], 1)
    assert "model.layers.0.self_attn.attn" in found.rank_specs[0]
    check(found)


def test_ranks_of_unequal_memory_have_equal_pools(split):
    found = split(MASKS["mixed"], 2)
    configs = found.configs([POOL_BYTES, POOL_BYTES // 2])
    expected = POOL_BYTES // 2 // rank_block_bytes(found.layout, 1)
    assert {config.num_blocks for config in configs} == {expected}


def test_scheduler_gets_all_groups_and_the_widest_ranks_block(split):
    """The first rank's caches are what it sees; here that rank has no streaming heads at all."""
    found = split(MASKS["retrieval on the first ranks alone"], 2)
    config = kv_cache_utils.generate_scheduler_kv_cache_config(found.configs())
    layout = check_and_report(found.config, config)
    assert layout == found.layout
    assert layout.block_bytes >= max(rank_block_bytes(layout, rank) for rank in (0, 1))


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("mask", ["mixed", "retrieval on the first ranks alone"])
def test_drafts_lengthen_the_ring_of_every_rank(split, mask, balance):
    balanced = {"threshold": None, "sparsity": 0.5, "balance": True}
    found = split(MASKS[mask], 2, drafts=5, **(balanced if balance else {}))
    check(found)
    rings = [
        {spec.span.ring_size for spec in own.values() if isinstance(spec, StreamingSpec)}
        for own in found.rank_specs
    ]
    assert rings == [{256 + 5}] * 2
    config = kv_cache_utils.generate_scheduler_kv_cache_config(found.configs())
    assert check_and_report(found.config, config) == found.layout
    if balance:
        assert [rank.num_retrieval for rank in found.layout.ranks] == [3, 3]


def test_a_cache_that_was_not_planned_is_noticed(split):
    found = split(MASKS["each layer of one class on each rank"], 2)
    configs = found.configs()
    with pytest.raises(RuntimeError, match="are not the planned ones"):
        check_groups(found.layout, configs[1], rank=0)


def test_layer_with_all_heads_on_every_rank_is_refused(split):
    found = split(MASKS["mixed"], 2)
    with (
        set_current_vllm_config(found.config),
        pytest.raises(ValueError, match=r"a layer has 4 KV heads.* 4 \(2 on each of 2 ranks\)"),
    ):
        Attention(8, HEAD_SIZE, 1.0, 4, cache_config=found.config.cache_config, prefix="layers.9.a")
