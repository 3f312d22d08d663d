"""Prefixes in files: answers after a load are those of a cold cache, whatever became of the files."""

from __future__ import annotations

import random

import pytest
from vllm.lora.request import LoRARequest

from tests.e2e.engine import write_pattern
from tests.e2e.stepper import Stepper
from tests.e2e.storage import record_loads, storing_engine, written
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.models.adapters import RANK, make_adapter
from tests.models.random_models import Shape, make_model
from tests.oracle import Oracle, assert_right
from vllm_duo.kv_transfer import store as store_module

pytestmark = pytest.mark.engine

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
SINK, RECENT = 20, 75
BLOCK = 16
NEW_TOKENS = 24
MASKS = {
    **{name: mask_of(name, SHAPE.kv_heads) for name in ("mixed", "streaming", "retrieval")},
    "several bins": [[True, False, False, False]] * 3,
}
# Shorter than the ring, at a block's edge, over several chunks.
LENGTHS = (10, 16, 17, 40, 96, 333, 900)


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint(SHAPE)


@pytest.fixture(scope="module")
def pattern_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patterns")
    return {name: write_pattern(folder / name, mask) for name, mask in MASKS.items()}


@pytest.fixture
def warnings(monkeypatch):
    """What the storage warns of."""
    told = []
    monkeypatch.setattr(
        store_module.logger, "warning", lambda text, *args: told.append(text % args)
    )
    return told


def stored_end(prompt):
    """Tokens of a prompt that a repetition resumes at."""
    return (len(prompt) - 1) // BLOCK * BLOCK


def oracle_of(model, name="mixed"):
    return Oracle(model, MASKS[name], SINK, RECENT)


def asked(running, monkeypatch, prompts, **sampling):
    """Answers of prompts one after another, and the tokens that each took from files."""
    stepper, loads = Stepper(running, monkeypatch), record_loads(running)
    answers = [
        stepper.ask(str(index), prompt, max_tokens=NEW_TOKENS, **sampling)
        for index, prompt in enumerate(prompts)
    ]
    return answers, [loads[str(index)] for index in range(len(prompts))]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.feature("prefixes in files")
def test_prefixes_survive_a_restart(name, model, pattern_of, tmp_path, monkeypatch):
    prompts = prompts_of(LENGTHS, seed=60)
    runs = []
    for _ in range(2):
        with storing_engine(
            model, pattern_of[name], tmp_path / "kv", max_num_batched_tokens=256
        ) as running:
            runs.append(asked(running, monkeypatch, prompts))
    (first, cold), (second, loaded) = runs
    assert cold == [0] * len(prompts)
    assert loaded == [stored_end(prompt) for prompt in prompts]
    assert [answer.tokens for answer in second] == [answer.tokens for answer in first]
    assert_right(oracle_of(model, name), prompts, first)
    assert_right(oracle_of(model, name), prompts, second)


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
        assert_right(oracle_of(model), prompts, answers)
        written()
        again, loaded = asked(running, monkeypatch, prompts)
    assert_right(oracle_of(model), prompts, again)
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
        for index, prompt in enumerate(prompts):
            stepper.add(str(index), prompt, max_tokens=NEW_TOKENS)
        stepper.run()
        answers = [stepper.answer(str(index)) for index in range(len(prompts))]
        hits = [stepper.hit(str(index)) for index in range(len(prompts))]
    assert_right(oracle_of(model), prompts, answers)
    assert loads == {"0": 704, "1": 0, "2": 0, "3": 0}
    assert hits == [704] * 4


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
    assert_right(oracle_of(model), prompts, answers)


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
        for index, prompt in enumerate(prompts):
            stepper.add(str(index), prompt, max_tokens=60)
        stepper.run()
        answers = [stepper.answer(str(index)) for index in range(len(prompts))]
    assert stepper.preempted
    assert sum(loads.values()) > sum(map(stored_end, prompts)) / 2
    assert_right(oracle_of(model), prompts, answers, 60)


@pytest.mark.feature("prefixes in files")
def test_other_servers_files_are_not_loaded(model, pattern_of, tmp_path, monkeypatch):
    """The same prompts under another mask of the same counts, other sizes, weights or types."""
    prompts = prompts_of([150, 333], seed=68)
    folder = tmp_path / "kv"
    with storing_engine(model, pattern_of["mixed"], folder) as running:
        asked(running, monkeypatch, prompts)
    turned = [row[::-1] for row in MASKS["mixed"]]
    turned_pattern = write_pattern(tmp_path / "turned", turned)
    other = make_model(SHAPE, tmp_path / "other", seed=1)
    for which, settings, oracle in (
        (model, {"pattern": turned_pattern}, Oracle(model, turned, SINK, RECENT)),
        (model, {"recent_size": 74}, Oracle(model, MASKS["mixed"], SINK, 74)),
        (model, {"sink_size": 21}, Oracle(model, MASKS["mixed"], 21, RECENT)),
        (other, {}, Oracle(other, MASKS["mixed"], SINK, RECENT)),
    ):
        pattern = settings.pop("pattern", pattern_of["mixed"])
        with storing_engine(which, pattern, folder, **settings) as running:
            answers, loaded = asked(running, monkeypatch, prompts)
        assert loaded == [0, 0]
        assert_right(oracle, prompts, answers)
    with storing_engine(model, pattern_of["mixed"], folder) as running:
        _, loaded = asked(running, monkeypatch, prompts)
    assert loaded == [stored_end(prompt) for prompt in prompts], "and the first server's are left"


@pytest.mark.feature("prefixes in files")
def test_salts_keep_apart_and_adapters_stay_out(model, pattern_of, tmp_path, monkeypatch):
    (prompt,) = prompts_of([150], seed=69)
    end = stored_end(prompt)
    adapter = make_adapter(model, tmp_path / "adapter", 1)
    loads = {}
    for run in ("first", "second"):
        with storing_engine(
            model,
            pattern_of["mixed"],
            tmp_path / "kv",
            enable_lora=True,
            max_loras=2,
            max_lora_rank=RANK,
            max_model_len=600,
        ) as running:
            stepper, loads[run] = Stepper(running, monkeypatch), record_loads(running)
            stepper.ask("salted", prompt, salt="a")
            running.llm.reset_prefix_cache()
            written()
            stepper.ask("again", prompt, salt="a")
            stepper.ask("other", prompt, salt="b" if run == "first" else "c")
            stepper.engine.add_request(
                "adapter",
                {"prompt_token_ids": list(prompt)},
                running.sampling(4),
                lora_request=LoRARequest("adapter", 1, str(adapter)),
            )
            stepper.run()
    assert loads["first"] == {"salted": 0, "again": end, "other": 0, "adapter": 0}
    assert loads["second"] == {"salted": end, "again": end, "other": 0, "adapter": 0}


def damage(path, how, others):
    """Spoil a file in one of the ways that disks and people do."""
    data = path.read_bytes()
    if how == "shorter":
        path.write_bytes(data[:-1])
    elif how == "longer":
        path.write_bytes(data + b"x")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "one bit":
        path.write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
    elif how == "zeros":
        path.write_bytes(bytes(len(data)))
    elif how == "another's":
        path.write_bytes(next(each for each in others if each != path).read_bytes())
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["page", "ring"])
@pytest.mark.feature("prefixes in files")
def test_damaged_files_are_misses_and_are_mended(
    kind, model, pattern_of, tmp_path, monkeypatch, warnings
):
    prompts, folder = prompts_of([150], seed=70), tmp_path / "kv"
    with storing_engine(model, pattern_of["mixed"], folder) as running:
        right, _ = asked(running, monkeypatch, prompts)
        written()
        files = sorted(folder.glob(f"*/*/*.{kind}"))
        pages = sorted(folder.glob("*/*/*.page"))
        for how in ("shorter", "longer", "empty", "one bit", "zeros", "another's", "gone"):
            for path in files:
                damage(path, how, pages)
            # As another server, which has not warned yet.
            running.core.scheduler.connector._store._told = False
            warnings.clear()
            for expected in (0, stored_end(prompts[0])):
                running.llm.reset_prefix_cache()
                answers, loaded = asked(running, monkeypatch, prompts)
                written()
                assert answers == right, how
                assert loaded == [expected], how
            assert len(warnings) == (how != "gone"), (how, warnings)
    assert_right(oracle_of(model), prompts, right)


@pytest.mark.feature("prefixes in files")
def test_hits_are_in_vllms_metrics(model, pattern_of, tmp_path, monkeypatch):
    prompts = prompts_of([150], seed=71)
    for _ in range(2):
        with storing_engine(
            model, pattern_of["mixed"], tmp_path / "kv", disable_log_stats=False
        ) as running:
            asked(running, monkeypatch, prompts)
            metrics = {each.name: each for each in running.llm.get_metrics()}
    assert metrics["vllm:external_prefix_cache_queries"].value >= 150
    assert metrics["vllm:external_prefix_cache_hits"].value >= stored_end(prompts[0])


@pytest.mark.feature("prefixes in files")
def test_reset_and_new_weights(model, pattern_of, tmp_path, monkeypatch):
    prompts, folder = prompts_of([150], seed=72), tmp_path / "kv"
    with storing_engine(model, pattern_of["mixed"], folder) as running:
        asked(running, monkeypatch, prompts)
        written()
        assert running.llm.llm_engine.reset_prefix_cache(reset_connector=True)
        assert not list(folder.glob("*/*/*.page"))
        answers, loaded = asked(running, monkeypatch, prompts)
        written()
        stored = len(list(folder.glob("*/*/*")))
        assert loaded == [0]
        assert stored
        running.llm.collective_rpc("reload_weights")
        running.llm.reset_prefix_cache()
        again, loaded = asked(running, monkeypatch, prompts)
        asked(running, monkeypatch, prompts_of([150], seed=73))
        written()
        assert loaded == [0]
        assert again == answers
        assert len(list(folder.glob("*/*/*"))) == stored
