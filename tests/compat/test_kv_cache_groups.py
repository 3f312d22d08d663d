"""The groups that vLLM forms are those that the layout planned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from tests.kv_cache.caches import layer_name, layout_of, specs_of, two_bins
from vllm_duo.attention.sibling_cache import SUFFIX
from vllm_duo.compat import kv_cache_groups
from vllm_duo.compat.kv_cache_groups import planned_groups
from vllm_duo.heads import HeadPattern
from vllm_duo.heads.discovery import PUBLISHED, list_shipped
from vllm_duo.kv_cache.spec import RetrievalSpec

SERVER = SimpleNamespace(
    speculative_config=None,
    scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
    attention_config=SimpleNamespace(hisparse_config=None),
)

PATTERNS = {
    "mixed": ((1, 1), (1, 1)),
    "all streaming": ((0, 0, 0), (2, 2, 2)),
    "exclusive": ((4, 0, 4, 0), (0, 4, 0, 4)),
    "one retrieval layer": ((8, 0, 0, 0, 0, 0), (0, 8, 8, 8, 8, 8)),
    "wide and uneven": ((1, 7, 0, 8, 3, 2), (7, 1, 8, 0, 5, 6)),
    "one layer is wider than all retrieval heads": ((1, 0, 0), (0, 8, 1)),
    "one against seven equal pages": ((1,) * 8, (7,) * 8),
    "one layer": ((1,), (1,)),
}


def named_bins(layout) -> list[set[str]]:
    """Cache names by bin; a layer without retrieval heads owns its streaming cache."""
    heads = layout.shape.retrieval_heads
    return [
        {layer_name(layer) + (SUFFIX if heads[layer] else "") for layer in layers}
        for layers in layout.bins
    ]


def check_groups(layout) -> None:
    specs = specs_of(layout)
    groups = kv_cache_utils.get_kv_cache_groups(SERVER, specs)
    formed = [set(group.layer_names) for group in groups]
    retrieval = {name for name, spec in specs.items() if isinstance(spec, RetrievalSpec)}
    assert formed == ([retrieval] if retrieval else []) + named_bins(layout)
    assert max(group.kv_cache_spec.page_size_bytes for group in groups) == layout.block_bytes


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("heads", PATTERNS.values(), ids=PATTERNS)
def test_groups_are_the_planned_bins(heads, block_size):
    check_groups(layout_of(*heads, block_size=block_size, sink_size=64, recent_size=256))


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("window", [40, 1000])
def test_groups_of_a_model_with_windows_of_its_own(window, block_size):
    heads = ((0, 2, 0, 3, 0), (4, 2, 4, 1, 4))
    windows = (window, None, window, None, window)
    check_groups(layout_of(*heads, block_size=block_size, windows=windows))


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", list_shipped())
def test_groups_of_a_shipped_pattern(name, sparsity, block_size):
    mask = HeadPattern.load(PUBLISHED / name).select(sparsity=sparsity).retrieval
    heads = tuple(map(int, mask.sum(axis=1))), tuple(map(int, (~mask).sum(axis=1)))
    check_groups(layout_of(*heads, block_size=block_size, sink_size=64, recent_size=256))


def test_order_of_the_layers_does_not_matter():
    specs = specs_of(layout_of((1, 2, 3), (3, 2, 1)))
    backwards = dict(reversed(specs.items()))
    assert [set(group.layer_names) for group in planned_groups(backwards)] == [
        set(group.layer_names) for group in planned_groups(specs)
    ]


def test_caches_of_two_bins_are_not_of_one_kind():
    layout = two_bins()
    streaming = {name: spec for name, spec in specs_of(layout).items() if SUFFIX in name}
    assert len(layout.bins) == 2
    assert UniformTypeKVCacheSpecs.from_specs(streaming) is None


@pytest.mark.parametrize(
    "foreign",
    [
        SlidingWindowSpec(
            block_size=16, num_kv_heads=1, head_size=16, dtype=torch.float32, sliding_window=32
        ),
        FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=16, dtype=torch.float32),
    ],
    ids=["sliding window", "full attention"],
)
def test_foreign_cache_is_refused_by_name(foreign):
    specs = specs_of(layout_of((1, 1), (1, 1))) | {"draft.layers.0.attn": foreign}
    with pytest.raises(
        NotImplementedError, match=rf"layer draft\.layers\.0\.attn keeps a {type(foreign).__name__}"
    ):
        kv_cache_utils.get_kv_cache_groups(SERVER, specs)


@pytest.mark.parametrize("heads", [((1, 1), (1, 1)), ((0, 0), (2, 2)), ((2, 2), (0, 0))])
@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("draft_model", ("draft_model.model.layers.0", "draft_model.model.layers.1")),
        ("eagle3", ("model.layers.2", "model.layers.3")),
    ],
)
def test_layers_that_draft_join_the_retrieval_heads(heads, method, names):
    """vLLM looks for them in one group, the first; their heads have another size."""
    layout = layout_of(*heads, draft_token_bytes=2 * 3 * 2 * 8 * 4)
    spec = RetrievalSpec(block_size=16, num_kv_heads=3, head_size=8, dtype=torch.float32)
    drafts = {f"{name}.self_attn.attn": spec for name in names}
    drafting = SimpleNamespace(method=method, draft_model_config=object())
    server = SimpleNamespace(**vars(SERVER) | {"speculative_config": drafting})
    groups = kv_cache_utils.get_kv_cache_groups(server, specs_of(layout) | drafts)
    assert drafts.keys() <= set(groups[0].layer_names)
    assert len(groups) == layout.num_groups
    assert max(group.kv_cache_spec.page_size_bytes for group in groups) == layout.block_bytes


def test_without_streaming_caches_vllms_own_function_decides():
    calls = []
    module = SimpleNamespace(get_kv_cache_groups=lambda *given: calls.append(given) or "vLLM's")
    kv_cache_groups.patch(module)
    specs = specs_of(layout_of((2, 2), (0, 0)))
    assert module.get_kv_cache_groups(SERVER, specs) == "vLLM's"
    assert calls == [(SERVER, specs)]


def test_model_of_full_attention_is_grouped_as_ever():
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=16, dtype=torch.float32)
    (group,) = kv_cache_utils.get_kv_cache_groups(SERVER, {"a": spec, "b": spec})
    assert (group.layer_names, group.kv_cache_spec) == (["a", "b"], spec)
