"""Patterns that `vllm-duo identify` finds are planned and served."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.e2e.engine import SETTINGS, engine
from tests.e2e.needle import MODEL, RECENT, SINK, accuracy, prompts, serve
from tests.e2e.test_exactness import prompts_of
from tests.identify import tiny
from tests.oracle import Oracle, assert_right
from vllm_duo import HeadPattern
from vllm_duo.identify.run import identify
from vllm_duo.identify.settings import IdentifySettings
from vllm_duo.planning.plan import PlanRequest, plan_memory

pytestmark = pytest.mark.engine

COUNT, LENGTH = 100, 1024


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Gates with the settings of docs/identification.md; seed 0."""
    settings = IdentifySettings(
        sink_size=SINK, recent_size=RECENT, max_length=512, steps=200, check_samples=0
    )
    return identify(str(MODEL), settings, tmp_path_factory.mktemp("found") / "gates").folder


@pytest.fixture(scope="module")
def upside_down(found, tmp_path_factory):
    """The same heads with the lowest quarter on top."""
    folder = tmp_path_factory.mktemp("upside_down") / "pattern"
    HeadPattern(1.0 - np.clip(HeadPattern.load(found).values, 0.0, 1.0)).save(folder)
    return folder


def served_accuracy(log, folder, sparsity):
    settings = {
        "pattern": str(folder),
        "sparsity": sparsity,
        "sink_size": SINK,
        "recent_size": RECENT,
    }
    arguments = ("--attention-backend", "duo", "--additional-config", json.dumps({"duo": settings}))
    with serve(log, *arguments) as server:
        server.wait_until_ready()
        return accuracy(server, prompts(LENGTH, COUNT, hidden=True))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_chosen_quarter_of_the_heads_is_enough(found, tmp_path):
    full = served_accuracy(tmp_path / "full", found, 0.0)
    chosen = served_accuracy(tmp_path / "chosen", found, 0.75)
    assert full >= 0.97
    assert full - chosen <= 0.03, (full, chosen)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_lowest_quarter_of_the_heads_is_not(upside_down, tmp_path):
    lowest = served_accuracy(tmp_path / "lowest", upside_down, 0.75)
    assert lowest <= 0.10, lowest


@pytest.mark.parametrize(
    ("method", "size"),
    [
        ("on-the-fly", {"samples": 2}),
        pytest.param("gates", {"steps": 3, "batch_size": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_pattern_of_a_model_with_learned_sinks_is_planned_and_served(method, size, tmp_path):
    """Of four KV heads in the layer that does not slide two stream; its settings are the pattern's."""
    window = 50
    shape = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "num_key_value_heads": 4}
    sizes = {**shape, "num_attention_heads": 8}
    model = tiny.save(tiny.sliding_gpt_oss(window, **sizes), tmp_path / "model")
    settings = IdentifySettings(
        method=method, sink_size=20, recent_size=75, max_length=300, check_samples=2, **size
    )
    found = identify(str(model), settings, tmp_path / "pattern")
    mask = found.pattern.select(sparsity=0.5, layers=[1])
    assert mask.retrieval.sum(1).tolist() == [0, 2, 0]
    duo = {"pattern": str(found.folder), "sparsity": 0.5}
    plan = plan_memory(
        PlanRequest(
            model=str(model),
            duo=duo,
            kv_cache_bytes=1 << 30,
            max_model_len=900,
            dtype="float32",
            block_size=16,
        )
    )
    assert plan.settings.mask_hash == mask.mask_hash
    assert (plan.settings.sink_size, plan.settings.recent_size) == (20, 75)
    with engine(
        model,
        attention_backend="duo",
        additional_config={"duo": duo | SETTINGS},
        max_model_len=900,
        max_num_batched_tokens=100,
    ) as running:
        pages = {tensor.size for tensor in running.core.scheduler.kv_cache_config.kv_cache_tensors}
        asked = prompts_of([1, 130, 700])
        answers = running.generate(asked)
        blocks = running.manager.block_pool.num_gpu_blocks
    assert {size // blocks for size in pages} == {plan.block_bytes}
    oracle = Oracle(model, mask.retrieval, 20, 75, windows=[window, None, window])
    assert_right(oracle, asked, answers)
    full = Oracle(model, np.ones_like(mask.retrieval), 20, 75, windows=[window, None, window])
    with pytest.raises(AssertionError, match="step"):
        assert_right(full, asked, answers)
