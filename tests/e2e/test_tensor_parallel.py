"""Tensor parallelism: the tokens of one rank, whatever share of the heads each rank has."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from tests.e2e.drafts import TEXTS, Outcomes
from tests.e2e.engine import MAX_NEW_TOKENS, engine, write_pattern
from tests.e2e.needle import FLAGS, MODEL, SERVER_ENV, greedy_ids, prompts
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.models.eagle_heads import make_head
from tests.models.random_models import Shape
from tests.oracle import Oracle, assert_right
from vllm_duo import HeadPattern
from vllm_duo.evaluate.server import ServerProcess
from vllm_duo.planning.plan import PlanRequest, plan_memory

pytestmark = pytest.mark.engine

SINK, RECENT = 20, 75
SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
LENGTHS = (1, 19, 333, 700)
# Layer by layer; two ranks have the left and the right half. "apart": rank 0 has no streaming heads,
# rank 1 no retrieval heads. "crossed": layers of one class on a rank, of the other or of both on the
# other rank.
MASKS = {
    "apart": [[1, 1, 0, 0]] * 3,
    "crossed": [[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 1, 0]],
}


@pytest.fixture(scope="module", autouse=True)
def two_cores():
    """Two ranks on one core would wait for each other most of the time."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("tensor parallelism 2 needs two cores, this process may use one")
    return cores[:2]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, two_cores):
    """The needle model over two ranks, else as ``half_server``."""
    flags = [*FLAGS, "--enforce-eager", "--attention-backend", "duo", "--tensor-parallel-size", "2"]
    env = SERVER_ENV | {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, two_cores))}
    log = tmp_path_factory.mktemp("two_ranks") / "log"
    with ServerProcess(MODEL, flags, log=log, env=env) as server:
        server.wait_until_ready()
        yield server


@pytest.mark.feature("tensor parallelism")
def test_served_tokens_are_those_of_one_rank(half_server, two_ranks):
    """The second time most of each prompt is a prefix hit: rings are restored on both ranks."""
    asked = [prompt for length in (256, 1024, 2048) for prompt in prompts(length, 5)]
    expected = greedy_ids(half_server, asked, max_tokens=16)
    assert greedy_ids(two_ranks, asked, max_tokens=16) == expected
    hits = "vllm_duo:streaming_prefix_hits_total{engine=0}"
    before = two_ranks.metrics()[hits]
    assert greedy_ids(two_ranks, asked, max_tokens=16) == expected
    assert two_ranks.metrics()[hits] - before == len(asked)


def test_plan_has_the_servers_figures(two_ranks):
    plan = plan_memory(
        PlanRequest(
            model=str(MODEL),
            kv_cache_bytes=1 << 30,
            max_model_len=4096,
            tensor_parallel_size=2,
            dtype="float32",
        )
    )
    greedy_ids(two_ranks, prompts(256, 1), max_tokens=1)  # the engine reports with its steps
    metrics = two_ranks.metrics()
    assert metrics["vllm_duo:block_bytes{engine=0}"] == plan.block_bytes
    assert metrics["vllm_duo:pool_blocks{engine=0}"] == plan.num_blocks - 1
    (note,) = plan.notes
    assert f"duo: {note}" in two_ranks.log.read_text()
    mask = HeadPattern.load(MODEL / "duo_pattern").select(sparsity=0.5).retrieval
    heads = np.sort([mask[:, :2].sum(), mask[:, 2:].sum()])
    assert f"{heads[0]} to {heads[1]} retrieval heads a rank" in note


def run(
    checkpoint,
    tmp_path,
    mask,
    *,
    table=None,
    ranks=2,
    shape=None,
    watch=lambda scheduler: None,
    **settings,
):
    """Ask the same twice; with prefix caching the second time resumes at snapshots.

    ``table``: the pattern's values, where the settings do not cut them at 0.5.
    """
    model = checkpoint(shape or SHAPE)
    prompts = prompts_of(LENGTHS)
    with engine(
        model,
        write_pattern(tmp_path / "pattern", mask if table is None else table),
        sink_size=SINK,
        recent_size=RECENT,
        max_num_batched_tokens=100,
        tensor_parallel_size=ranks,
        **{"distributed_executor_backend": "mp", **settings},
    ) as running:
        watch(running.core.scheduler)
        answers = running.generate(prompts) + running.generate(prompts)
    assert_right(Oracle(model, mask, SINK, RECENT), prompts * 2, answers, MAX_NEW_TOKENS)


@pytest.mark.feature("tensor parallelism")
def test_tokens_are_the_oracles(checkpoint, tmp_path):
    run(checkpoint, tmp_path, MASKS["apart"], enable_prefix_caching=False)


@pytest.mark.slow
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("mask", [*MASKS, "mixed", "exclusive", "uneven", "streaming", "retrieval"])
def test_tokens_are_the_oracles_for_every_mask(mask, caching, checkpoint, tmp_path):
    chosen = MASKS.get(mask) or mask_of(mask, 4)
    run(checkpoint, tmp_path, chosen, enable_prefix_caching=caching)


@pytest.mark.slow
@pytest.mark.feature("balanced ranks")
def test_balanced_ranks_give_the_oracles_tokens(checkpoint, tmp_path):
    """Rank 0 has the higher values: cut together, all heads of rank 1 would stream."""
    table = [[0.9, 0.8, 0.1, 0.2], [0.6, 0.9, 0.3, 0.1], [0.7, 0.6, 0.2, 0.4]]
    pattern = HeadPattern(table)
    chosen = pattern.select(sparsity=0.5, balance_ranks=2).retrieval
    assert (chosen != pattern.select(sparsity=0.5).retrieval).any()
    duo = {"threshold": None, "sparsity": 0.5, "balance": True}
    run(checkpoint, tmp_path, chosen, table=table, duo_settings=duo)


@pytest.mark.slow
@pytest.mark.feature("more ranks than KV heads")
def test_four_ranks_share_two_kv_heads(checkpoint, tmp_path):
    """More ranks than KV heads: vLLM copies them."""
    shape = Shape("llama", group=8, head_size=32, kv_heads=2)
    run(checkpoint, tmp_path, mask_of("mixed", 2), ranks=4, shape=shape)


@pytest.mark.slow
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.feature("speculative decoding, custom proposer")
def test_drafts_change_no_token(caching, checkpoint, tmp_path, monkeypatch):
    """Both ranks draft for themselves, and the same."""
    asked, seen = prompts_of(LENGTHS), []
    pattern = write_pattern(tmp_path / "pattern", MASKS["crossed"])
    with engine(checkpoint(SHAPE), pattern, sink_size=SINK, recent_size=RECENT) as running:
        answers = running.generate(asked)
    texts = [prompt + list(answer.tokens) for prompt, answer in zip(asked, answers, strict=True)]
    (tmp_path / "texts").write_text(json.dumps(texts))
    monkeypatch.setenv(TEXTS, str(tmp_path / "texts"))
    run(
        checkpoint,
        tmp_path,
        MASKS["crossed"],
        watch=lambda scheduler: seen.append(Outcomes(scheduler, monkeypatch)),
        enable_prefix_caching=caching,
        speculative_config={
            "method": "custom_class",
            "model": "tests.e2e.drafts.Scripted",
            "num_speculative_tokens": 4,
        },
    )
    (outcomes,) = seen
    assert sum(outcomes.accepted[count] for count in range(1, 5)) > 20
    assert sum(outcomes.rejected.values()) > 20


@pytest.mark.slow
@pytest.mark.feature("draft model or EAGLE head on several ranks")
@pytest.mark.parametrize("method", ["eagle", "eagle3", "draft_model"])
def test_layers_that_draft_change_no_token(method, checkpoint, tmp_path, monkeypatch):
    """Each rank has its share of their heads. The model itself, all of whose heads see everything, and
    heads of copies of its layers are often right."""
    model, seen = checkpoint(SHAPE), []
    drafter = model if method == "draft_model" else make_head(model, method, tmp_path)
    run(
        checkpoint,
        tmp_path,
        MASKS["crossed"],
        watch=lambda scheduler: seen.append(Outcomes(scheduler, monkeypatch)),
        speculative_config={"method": method, "model": str(drafter), "num_speculative_tokens": 3},
    )
    (outcomes,) = seen
    assert sum(outcomes.accepted[count] for count in (1, 2, 3)) > 20
    assert sum(outcomes.rejected.values()) > 20


@pytest.mark.slow
def test_compiled_model_gives_the_same_tokens(checkpoint, tmp_path):
    run(checkpoint, tmp_path, MASKS["crossed"], enforce_eager=False)
