"""Checkpoints that ask for a KV cache in fp8 and bring its scales: the oracle's answers with those.

As in ``test_quantised_cache.py`` a served key crosses the edge of a quantisation step now and then.
"""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.e2e.engine import engine, ranks_of, write_pattern
from tests.e2e.half import errors, rms
from tests.e2e.stepper import Stepper
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.e2e.test_quantised_cache import BLOCK, ERROR, MATTERS
from tests.models.quantised import with_cache_scales
from tests.models.random_models import Shape
from tests.oracle import Oracle
from vllm_duo.kv_cache.formats import FORMATS
from vllm_duo.ops.quantise import dequantise, quantise

pytestmark = [
    pytest.mark.engine,
    pytest.mark.feature("quantised KV cache, by the checkpoint"),
]

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
SINK, RECENT = 20, 75
MASKS = {name: mask_of(name, SHAPE.kv_heads) for name in ("retrieval", "uneven")}
PROMPTS = prompts_of([150] * 4, seed=43)
ANSWER_TOKENS = 90
FORM = FORMATS["fp8"]
# Of the keys and the values of each layer; no powers of two, which would hardly move a rounding. The
# least let numbers beyond 5.8 and 4.9 saturate.
SCALES = [(0.37, 0.011), (0.013, 1.7), (2.3, 0.05)]


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scales") / "model"
    return with_cache_scales(checkpoint(SHAPE), folder, SCALES)


@pytest.fixture(scope="module")
def serve(model, tmp_path_factory):
    def serve(mask="uneven", **settings):
        folder = tmp_path_factory.mktemp("patterns")
        pattern = mask and write_pattern(folder, MASKS[mask])
        sizes = {"sink_size": SINK, "recent_size": RECENT, "block_size": BLOCK}
        limits = {"max_model_len": 400, "max_num_batched_tokens": 128}
        return engine(model, pattern, **(sizes | limits | settings))

    return serve


@pytest.fixture(scope="module")
def error_of(checkpoint):
    """Of answers, from the oracle that computes with what such a cache keeps."""

    def error_of(answers, mask="uneven", scales=SCALES, form=FORM, **settings):
        model = Oracle(
            checkpoint(SHAPE), MASKS[mask], SINK, RECENT, form, scales=scales, **settings
        )
        return rms(errors(model, PROMPTS, answers))

    return error_of


def test_answers_are_those_of_what_is_kept(serve, error_of, monkeypatch):
    """In chunks, with prefix caching, in a pool that holds four prompts and not their answers."""
    with serve(num_gpu_blocks_override=60) as running:
        assert running.llm.llm_engine.vllm_config.cache_config.cache_dtype == "fp8"
        stepper = Stepper(running, monkeypatch)
        answers = stepper.ask_all(PROMPTS, max_tokens=ANSWER_TOKENS)
        again = running.generate(PROMPTS, ANSWER_TOKENS)
        stored = running.block_bytes()
    assert stepper.preempted
    error = error_of(answers)
    assert error <= ERROR
    assert error_of(again) <= ERROR, "from cached prefixes"
    assert error_of(answers, scales=None) > MATTERS * error, "the scales must matter"
    swapped = [(value, key) for key, value in SCALES]
    assert error_of(answers, scales=swapped) > MATTERS * error, "which is which must matter"
    # A block has the bytes of the retrieval heads of all layers, the widest group.
    assert stored == {sum(map(sum, MASKS["uneven"])) * BLOCK * FORM.row_bytes(SHAPE.head_size)}


@pytest.mark.slow
@pytest.mark.feature("quantised KV cache, of the retrieval heads alone")
def test_streaming_heads_in_the_models_dtype(serve, error_of):
    """The second time from snapshots."""
    with serve(duo_settings={"streaming_cache_dtype": "model"}) as running:
        answers = running.generate(PROMPTS, ANSWER_TOKENS)
        again = running.generate(PROMPTS, ANSWER_TOKENS)
    for each in (answers, again):
        error = error_of(each, streaming_quantised=False)
        assert error <= ERROR
        both = error_of(each, streaming_quantised=True)
        assert both > MATTERS * error, "what streaming heads keep must matter"


def toward_zero(key, value, form, *scales):
    """``quantise`` as stock vLLM's kernels for CPUs round."""
    rows = quantise(key, value, form, *scales)
    kept = dequantise(rows, form, *scales)
    beyond = [found.abs() > exact.abs() for found, exact in zip(kept, (key, value), strict=True)]
    return rows - torch.cat(beyond, -1).byte()


@pytest.mark.slow
@pytest.mark.avx512
def test_stock_vllm_means_the_same_scales(serve, error_of, monkeypatch):
    """It rounds toward zero, else both engines answer as one oracle does; stock needs AVX-512."""
    found = {}
    for mask in (None, "retrieval"):
        with serve(mask, block_size=128) as running:
            found[mask] = running.generate(PROMPTS, ANSWER_TOKENS)
    assert error_of(found["retrieval"], "retrieval") <= ERROR
    monkeypatch.setattr(oracle, "quantise", toward_zero)
    stock = error_of(found[None], "retrieval")
    assert stock <= ERROR
    assert error_of(found["retrieval"], "retrieval") > MATTERS * stock, "roundings must matter"


@pytest.mark.slow
def test_another_format_takes_no_scales(serve, error_of):
    """``--kv-cache-dtype`` comes first: the checkpoint's scales are then of no consequence."""
    with serve(kv_cache_dtype="int8_per_token_head") as running:
        answers = running.generate(PROMPTS, ANSWER_TOKENS)
    assert error_of(answers, form=FORMATS["int8_per_token_head"]) <= ERROR


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
    with serve(**settings) as running:
        assert running.is_compiled() == (how == "compiled")
        answers = running.generate(PROMPTS, ANSWER_TOKENS)
        again = running.generate(PROMPTS, ANSWER_TOKENS)
    for each in (answers, again):
        error = error_of(each)
        assert error <= ERROR
        assert error_of(each, scales=None) > MATTERS * error, "the scales must matter"
