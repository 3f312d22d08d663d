"""Prefixes in files: a prompt that is resumed from them gets the answer of a cold cache."""

from __future__ import annotations

import json
import random
import time

import pytest

from tests.e2e.engine import write_pattern
from tests.e2e.needle import greedy_ids, serve
from tests.e2e.needle import prompts as prompts_of_needle
from tests.e2e.stepper import Stepper
from tests.e2e.storage import (
    BLOCK,
    MASKS,
    NEW_TOKENS,
    SHAPE,
    asked,
    json_config,
    oracle_of,
    record_loads,
    stored_end,
    storing_engine,
    tokens_of,
    write_patterns,
    written,
)
from tests.e2e.test_exactness import prompts_of
from tests.models.random_models import Shape
from tests.oracle import assert_right

pytestmark = pytest.mark.engine

# Shorter than the ring, at a block's edge, over several chunks.
LENGTHS = (10, 16, 17, 40, 96, 333, 900)


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint(SHAPE)


@pytest.fixture(scope="module")
def pattern_of(tmp_path_factory):
    return write_patterns(tmp_path_factory.mktemp("patterns"))


def wait_for_files(folder, rings):
    """Wait until a server has written what it stores: so many rings, and nothing for a second."""
    deadline, last = time.monotonic() + 60, []
    while len([path for path in last if path.suffix == ".ring"]) < rings or last != sorted(
        folder.glob("*/*/*")
    ):
        assert time.monotonic() < deadline, last
        last = sorted(folder.glob("*/*/*"))
        time.sleep(1)


def external_tokens(running):
    """Tokens asked of and found in files so far, as ``/metrics`` has them."""
    values = {
        each.name: each.value for each in running.llm.get_metrics() if "external" in each.name
    }
    names = ("queries", "hits")
    return [values.get(f"vllm:external_prefix_cache_{name}", 0) for name in names]


@pytest.mark.parametrize(
    "name",
    [
        "mixed",
        "streaming",
        pytest.param("retrieval", marks=pytest.mark.slow),
        pytest.param("several bins", marks=pytest.mark.slow),
    ],
)
@pytest.mark.feature("prefixes in files")
def test_prefixes_survive_a_restart(name, model, pattern_of, tmp_path, monkeypatch):
    prompts = prompts_of(LENGTHS, seed=60)
    runs = []
    for _ in range(2):
        with storing_engine(
            model,
            pattern_of[name],
            tmp_path / "kv",
            max_num_batched_tokens=256,
            disable_log_stats=False,
        ) as running:
            before = external_tokens(running)
            runs.append(asked(running, monkeypatch, prompts))
            queries, hits = (
                now - then for now, then in zip(external_tokens(running), before, strict=True)
            )
    (first, cold), (second, loaded) = runs
    assert cold == [0] * len(prompts)
    assert loaded == [stored_end(prompt) for prompt in prompts]
    assert tokens_of(second) == tokens_of(first)
    assert_right(oracle_of(model, name), prompts, first, NEW_TOKENS)
    assert_right(oracle_of(model, name), prompts, second, NEW_TOKENS)
    assert (queries, hits) == (sum(LENGTHS), sum(loaded)), "vLLM's own metrics"


@pytest.mark.feature("prefixes in files")
def test_a_worker_in_a_process_of_its_own_loads_and_stores(
    model, pattern_of, tmp_path, monkeypatch
):
    """As in every server of vLLM's on CPUs: what was read travels to it with the step."""
    folder, prompts = tmp_path / "kv", prompts_of((900, 300), seed=59)
    with storing_engine(model, pattern_of["mixed"], folder) as running:
        asked(running, monkeypatch, prompts[:1])
    with storing_engine(
        model, pattern_of["mixed"], folder, distributed_executor_backend="mp"
    ) as running:
        answers, loaded = asked(running, monkeypatch, prompts)
    assert loaded == [stored_end(prompts[0]), 0]
    assert_right(oracle_of(model), prompts, answers, NEW_TOKENS)
    stored = sum(stored_end(prompt) // BLOCK for prompt in prompts)
    assert len(list(folder.glob("*/*/*.page"))) == stored
    assert len({path.parents[1] for path in folder.glob("*/*/*.page")}) == 1, "in one folder"


@pytest.mark.feature("prefixes in files")
def test_prefixes_survive_eviction_from_the_pool(model, pattern_of, tmp_path, monkeypatch):
    """Pages of one prompt are still in the pool, or its snapshot, when the rest has gone."""
    shared = prompts_of([200, 260], seed=61)
    prompts = [
        shared[index % 2][: 100 + 20 * index] + tail
        for index, tail in enumerate(prompts_of([90] * 8, seed=62))
    ]
    with storing_engine(
        model,
        pattern_of["mixed"],
        tmp_path / "kv",
        max_model_len=400,
        max_num_batched_tokens=128,
        num_gpu_blocks_override=70,
    ) as running:
        answers, _ = asked(running, monkeypatch, prompts)
        assert_right(oracle_of(model), prompts, answers, NEW_TOKENS)
        written()
        again, loaded = asked(running, monkeypatch, prompts)
    assert_right(oracle_of(model), prompts, again, NEW_TOKENS)
    assert sum(hit > 0 for hit in loaded) >= 5, loaded


@pytest.mark.feature("prefixes in files")
def test_requests_at_once_share_what_one_of_them_loads(model, pattern_of, tmp_path, monkeypatch):
    """The others find it in the pool in the very step that loads it."""
    (shared,) = prompts_of([704], seed=63)
    prompts = [shared + tail for tail in prompts_of([31, 1, 200, 17], seed=64)]
    folder = tmp_path / "kv"
    with storing_engine(model, pattern_of["mixed"], folder) as running:
        asked(running, monkeypatch, [[*shared, 1, 2, 3]])
    with storing_engine(model, pattern_of["mixed"], folder) as running:
        stepper, loads = Stepper(running, monkeypatch), record_loads(running)
        answers = stepper.ask_all(prompts, max_tokens=NEW_TOKENS)
        hits = [stepper.hit(str(index)) for index in range(len(prompts))]
    assert_right(oracle_of(model), prompts, answers, NEW_TOKENS)
    assert loads == {"0": 704, "1": 0, "2": 0, "3": 0}
    assert hits == [704] * 4


@pytest.mark.slow
@pytest.mark.feature("prefixes in files")
def test_a_turn_of_a_chat_loads_the_last_ones_prompt(model, pattern_of, tmp_path, monkeypatch):
    rng = random.Random(65)
    history, prompts, answers, loads = [], [], [], []
    for turn in (700, 50, 170):
        prompt = history + [rng.randrange(3, 200) for _ in range(turn)]
        with storing_engine(model, pattern_of["mixed"], tmp_path / "kv") as running:
            (answer,), loaded = asked(running, monkeypatch, [prompt])
        prompts.append(prompt)
        answers.append(answer)
        loads += loaded
        history = prompt + list(answer.tokens)
    assert loads == [0, *(len(prompt) // BLOCK * BLOCK for prompt in prompts[:-1])]
    assert_right(oracle_of(model), prompts, answers, NEW_TOKENS)


@pytest.mark.feature("prefixes in files", "preemption")
def test_preemption_with_loads_in_a_small_pool(model, pattern_of, tmp_path, monkeypatch):
    shared = prompts_of([150], seed=66)[0]
    prompts = [shared[: 60 + 15 * n] + tail for n, tail in enumerate(prompts_of([50] * 6, 67))]
    settings = {"max_model_len": 300, "max_num_batched_tokens": 64}
    folder = tmp_path / "kv"
    with storing_engine(model, pattern_of["mixed"], folder, **settings) as running:
        asked(running, monkeypatch, prompts)
    with storing_engine(
        model, pattern_of["mixed"], folder, num_gpu_blocks_override=60, **settings
    ) as running:
        stepper, loads = Stepper(running, monkeypatch), record_loads(running)
        answers = stepper.ask_all(prompts, max_tokens=60)
    assert stepper.preempted
    assert sum(loads.values()) > sum(map(stored_end, prompts)) / 2
    assert_right(oracle_of(model), prompts, answers, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "several bins"])
@pytest.mark.feature("prefixes in files", "preemption")
def test_random_requests_over_restarts_with_little_room(
    name, model, pattern_of, tmp_path, monkeypatch
):
    """In the pool and in the folder; aborted and preempted, with files that come and go."""
    rng = random.Random(75)
    trunks = prompts_of([300, 260, 180], seed=76)
    loaded, preempted = 0, 0
    for _ in range(4):
        tails = prompts_of([rng.randrange(1, 120) for _ in range(30)], seed=rng.randrange(10**6))
        prompts = [rng.choice(trunks)[: rng.randrange(30, 301)] + tail for tail in tails]
        with storing_engine(
            model,
            pattern_of[name],
            tmp_path / "kv",
            max_bytes=3 << 20,
            max_model_len=500,
            max_num_batched_tokens=128,
            num_gpu_blocks_override=110,
        ) as running:
            stepper, loads = Stepper(running, monkeypatch), record_loads(running)
            for index, prompt in enumerate(prompts):
                stepper.add(str(index), prompt, max_tokens=NEW_TOKENS)
                stepper.step(rng.randrange(4))
                if rng.random() < 0.1:
                    stepper.engine.abort_request([str(index)])
                if rng.random() < 0.2:
                    written()
                if rng.random() < 0.1:
                    written()
                    files = sorted((tmp_path / "kv").glob("*/*/*"))
                    for path in rng.sample(files, min(3, len(files))):
                        path.write_bytes(path.read_bytes()[:-1])
            stepper.run()
            done = [index for index in range(len(prompts)) if str(index) in stepper.outputs]
            answers = [stepper.answer(str(index)) for index in done]
            loaded += sum(loads.values())
            preempted += sum(stepper.preempted.values())
        whole = [n for n, answer in enumerate(answers) if len(answer.tokens) == NEW_TOKENS]
        assert_right(
            oracle_of(model, name),
            [prompts[done[n]] for n in whole],
            [answers[n] for n in whole],
            NEW_TOKENS,
        )
        size = sum(path.stat().st_size for path in (tmp_path / "kv").glob("*/*/*"))
        assert size <= 3 << 20
    assert loaded > 1000
    assert preempted


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", ["fp8", "int8_per_token_head", "int4_per_token_head"])
@pytest.mark.parametrize("own", ["same", "model"])
@pytest.mark.feature("prefixes in files")
def test_quantised_caches_are_bytes_like_others(
    own, cache_dtype, model, pattern_of, tmp_path, monkeypatch
):
    """What is loaded is what was computed, so a hit from a file answers as one from the pool."""
    prompts = prompts_of((96, 333), seed=74)
    settings = {"kv_cache_dtype": cache_dtype, "duo_settings": {"streaming_cache_dtype": own}}
    with storing_engine(model, pattern_of["mixed"], tmp_path / "kv", **settings) as running:
        asked(running, monkeypatch, prompts)
        from_pool, loaded = asked(running, monkeypatch, prompts)
        assert loaded == [0, 0]
    with storing_engine(model, pattern_of["mixed"], tmp_path / "kv", **settings) as running:
        from_files, loaded = asked(running, monkeypatch, prompts)
    assert loaded == [stored_end(prompt) for prompt in prompts]
    assert from_files == from_pool


@pytest.mark.slow
@pytest.mark.feature("prefixes in files", "sliding-window layers")
def test_rings_of_a_models_own_windows(checkpoint, tmp_path, monkeypatch):
    """Bins of two spans; what is loaded is what was computed."""
    shape = Shape("gemma3", group=2, head_size=32, kv_heads=4, window=40)
    pattern = write_pattern(tmp_path / "pattern", MASKS["mixed"])
    prompts = prompts_of((30, 96, 333), seed=77)
    with storing_engine(checkpoint(shape), pattern, tmp_path / "kv") as running:
        spans = {ring.span for ring in running.core.scheduler.connector._shape.rings}
        assert len(spans) == 2
        asked(running, monkeypatch, prompts)
        from_pool, _ = asked(running, monkeypatch, prompts)
    with storing_engine(checkpoint(shape), pattern, tmp_path / "kv") as running:
        from_files, loaded = asked(running, monkeypatch, prompts)
    assert loaded == [stored_end(prompt) for prompt in prompts]
    assert from_files == from_pool


@pytest.mark.slow
@pytest.mark.feature("prefixes in files")
def test_two_servers_share_a_folder_and_one_that_was_killed_left_it_whole(tmp_path, half_server):
    asked_prompts = prompts_of_needle(700, 6)
    given = {"max_tokens": 12, "ignore_eos": True}
    right = greedy_ids(half_server, asked_prompts, **given)
    transfer = json.dumps(json_config(tmp_path / "kv"))
    flags = ("--attention-backend", "duo", "--kv-transfer-config", transfer)
    with serve(tmp_path / "first", *flags) as first, serve(tmp_path / "second", *flags) as second:
        for server in (first, second):
            server.wait_until_ready()
        assert greedy_ids(first, asked_prompts, **given) == right
        wait_for_files(tmp_path / "kv", len(asked_prompts))
        assert greedy_ids(second, asked_prompts, **given) == right
        hits = sum(second.metrics("vllm:external_prefix_cache_hits_total").values())
        assert hits >= len(asked_prompts) * 512
        first.process.kill()
    with serve(tmp_path / "third", *flags) as third:
        third.wait_until_ready()
        assert greedy_ids(third, asked_prompts, **given) == right
        assert sum(third.metrics("vllm:external_prefix_cache_hits_total").values()) >= hits
