"""Prefixes in files that must not be used: of other servers, salts and weights, and damaged ones."""

from __future__ import annotations

import pytest
from vllm.lora.request import LoRARequest

from tests.e2e.engine import write_pattern
from tests.e2e.stepper import Stepper
from tests.e2e.storage import (
    BLOCK,
    MASKS,
    NEW_TOKENS,
    RECENT,
    SHAPE,
    SINK,
    asked,
    oracle_of,
    record_loads,
    stored_end,
    storing_engine,
    tokens_of,
    write_patterns,
    written,
)
from tests.e2e.test_exactness import prompts_of
from tests.messages import messages_of
from tests.models.adapters import RANK, make_adapter
from tests.models.random_models import make_model
from tests.oracle import Oracle, assert_right
from vllm_duo.kv_transfer import store as store_module

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint(SHAPE)


@pytest.fixture(scope="module")
def pattern_of(tmp_path_factory):
    return write_patterns(tmp_path_factory.mktemp("patterns"))


@pytest.fixture
def warnings(monkeypatch):
    """What the storage warns of."""
    return messages_of(store_module, monkeypatch)


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
        assert_right(oracle, prompts, answers, NEW_TOKENS)
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


@pytest.mark.feature("prefixes in files")
def test_damaged_files_are_misses_and_are_mended(
    model, pattern_of, tmp_path, monkeypatch, warnings
):
    prompts, folder = prompts_of([150], seed=70), tmp_path / "kv"
    with storing_engine(model, pattern_of["mixed"], folder) as running:
        right, _ = asked(running, monkeypatch, prompts)
        written()
        pages, rings = (sorted(folder.glob(f"*/*/*.{kind}")) for kind in ("page", "ring"))
        assert (len(pages), len(rings)) == (stored_end(prompts[0]) // BLOCK, 1)
        for how in ("shorter", "longer", "empty", "one bit", "zeros", "another's", "gone"):
            for files in (pages, pages[3:4], rings):
                for path in files:
                    damage(path, how, pages)
                # As another server, which has not warned yet.
                running.core.scheduler.connector._store._told = False
                warnings.clear()
                for expected in (0, stored_end(prompts[0])):
                    running.llm.reset_prefix_cache()
                    answers, loaded = asked(running, monkeypatch, prompts)
                    written()
                    assert tokens_of(answers) == tokens_of(right), how
                    assert loaded == [expected], how
                assert len(warnings) == (how != "gone"), (how, warnings)
    assert_right(oracle_of(model), prompts, right, NEW_TOKENS)


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
        assert tokens_of(again) == tokens_of(answers)
        assert len(list(folder.glob("*/*/*"))) == stored
