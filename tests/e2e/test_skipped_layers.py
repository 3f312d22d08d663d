"""Layers that a quantised KV cache leaves out: the oracle's answers, and the bytes that were planned.

As in ``test_quantised_cache.py`` a served key crosses the edge of a quantisation step now and then.
"""

from __future__ import annotations

import pytest

from tests.e2e.engine import engine, ranks_of, write_pattern
from tests.e2e.half import errors, rms
from tests.e2e.stepper import Stepper
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.e2e.test_quantised_cache import BLOCK, ERROR, MATTERS
from tests.models.random_models import Shape
from tests.oracle import Oracle
from vllm_duo.kv_cache.formats import FORMATS
from vllm_duo.planning.plan import PlanRequest, plan_memory

pytestmark = [pytest.mark.engine, pytest.mark.feature("quantised KV cache, some layers")]

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
SLIDING = Shape("gemma3", group=2, head_size=32, kv_heads=4, window=50)
SINK, RECENT = 20, 75
MASK = mask_of("mixed", SHAPE.kv_heads)  # two heads of four in each of three layers
PROMPTS = prompts_of([150] * 4, seed=43)
ANSWER_TOKENS = 90
FORM = "int4_per_token_head"


@pytest.fixture(scope="module")
def serve(checkpoint, tmp_path_factory):
    def serve(skipped, shape=SHAPE, form=FORM, **settings):
        pattern = write_pattern(tmp_path_factory.mktemp("patterns"), MASK)
        sizes = {"sink_size": SINK, "recent_size": RECENT, "block_size": BLOCK}
        limits = {"max_model_len": 400, "max_num_batched_tokens": 128}
        cache = {"kv_cache_dtype": form, "kv_cache_dtype_skip_layers": skipped}
        return engine(checkpoint(shape), pattern, **(sizes | limits | cache | settings))

    return serve


@pytest.fixture(scope="module")
def error_of(checkpoint):
    def error_of(answers, skipped, shape=SHAPE, form=FORM, **settings):
        oracle = Oracle(
            checkpoint(shape),
            MASK,
            SINK,
            RECENT,
            FORMATS[form],
            skipped=skipped,
            windows=shape.windows,
            **settings,
        )
        return rms(errors(oracle, PROMPTS, answers))

    return error_of


def test_answers_and_bytes(serve, error_of, checkpoint, tmp_path, monkeypatch):
    """In chunks, with prefix caching, in a pool that holds four prompts and not their answers."""
    with serve(["1"], num_gpu_blocks_override=75) as running:
        stepper = Stepper(running, monkeypatch)
        answers = stepper.ask_all(PROMPTS, max_tokens=ANSWER_TOKENS)
        again = running.generate(PROMPTS, ANSWER_TOKENS)
        stored = running.block_bytes()
    assert stepper.preempted
    error = error_of(answers, {1})
    assert error <= ERROR
    assert error_of(again, {1}) <= ERROR, "from cached prefixes"
    for other in (set(), {0}, {0, 1, 2}):
        assert error_of(answers, other) > MATTERS * error, f"not the layers {other}"
    # 16 tokens of two retrieval heads in each of three layers, one of them in float32.
    row = FORMATS[FORM].row_bytes(SHAPE.head_size)
    assert stored == {BLOCK * 2 * (2 * row + 2 * SHAPE.head_size * 4)}
    duo = {"pattern": str(write_pattern(tmp_path, MASK)), "threshold": 0.5}
    plan = plan_memory(
        PlanRequest(
            model=str(checkpoint(SHAPE)),
            duo=duo | {"sink_size": SINK, "recent_size": RECENT},
            kv_cache_bytes=2**20,
            max_model_len=400,
            dtype="float32",
            kv_cache_dtype=FORM,
            skip_layers=["1"],
            block_size=BLOCK,
        )
    )
    assert stored == {plan.block_bytes}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8", "int8_per_token_head"])
@pytest.mark.parametrize("skipped", [["0", "2"], ["0", "1", "2"]], ids=" ".join)
def test_other_formats_and_layers(serve, error_of, skipped, form):
    with serve(skipped, form=form) as running:
        answers = running.generate(PROMPTS, ANSWER_TOKENS)
    layers = set(map(int, skipped))
    error = error_of(answers, layers, form=form)
    assert error <= ERROR
    assert error_of(answers, set(), form=form) > MATTERS * error, "which layers must matter"


@pytest.mark.slow
@pytest.mark.feature("quantised KV cache, of the retrieval heads alone")
def test_streaming_heads_in_the_models_dtype(serve, error_of):
    """In every layer; retrieval heads keep it in the one that is skipped."""
    with serve(["1"], duo_settings={"streaming_cache_dtype": "model"}) as running:
        answers = running.generate(PROMPTS, ANSWER_TOKENS)
        again = running.generate(PROMPTS, ANSWER_TOKENS)
    for each in (answers, again):
        error = error_of(each, {1}, streaming_quantised=False)
        assert error <= ERROR
        assert error_of(each, {1}) > MATTERS * error, "what streaming heads keep must matter"
        assert error_of(each, set(), streaming_quantised=False) > MATTERS * error


@pytest.mark.slow
@pytest.mark.feature("sliding-window layers")
def test_layers_with_a_window(serve, error_of):
    """The first and the last of three, by one word."""
    with serve(["sliding_window"], SLIDING) as running:
        answers = running.generate(PROMPTS, ANSWER_TOKENS)
        again = running.generate(PROMPTS, ANSWER_TOKENS)
    for each in (answers, again):
        error = error_of(each, {0, 2}, SLIDING)
        assert error <= ERROR
        assert error_of(each, set(), SLIDING) > MATTERS * error, "which layers must matter"


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        pytest.param("compiled", marks=pytest.mark.feature("torch.compile")),
        pytest.param("two ranks", marks=pytest.mark.feature("tensor parallelism")),
    ],
)
def test_the_same_is_kept(how, serve, error_of):
    """By vLLM's default mode, and by each of two ranks; the second time from cached prefixes."""
    settings = {"enforce_eager": False} if how == "compiled" else ranks_of(2)
    with serve(["1"], **settings) as running:
        assert running.is_compiled() == (how == "compiled")
        answers = running.generate(PROMPTS, ANSWER_TOKENS)
        again = running.generate(PROMPTS, ANSWER_TOKENS)
    for each in (answers, again):
        error = error_of(each, {1})
        assert error <= ERROR
        assert error_of(each, set()) > MATTERS * error, "which layers must matter"
