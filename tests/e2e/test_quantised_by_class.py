"""Quantised retrieval heads beside streaming heads in the model's own dtype: the oracle's answers.

As in ``test_quantised_cache.py`` a served key crosses the edge of a quantisation step now and then.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from vllm.v1.kv_cache_interface import AttentionSpec, iter_layer_specs

from tests.e2e.engine import Answer, engine, ranks_of, write_pattern
from tests.e2e.half import errors, rms
from tests.e2e.stepper import Stepper
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.e2e.test_quantised_cache import BLOCK, ERROR, MATTERS
from tests.models.random_models import Shape
from tests.oracle import Oracle
from vllm_duo.compat.pool_report import LAYOUT
from vllm_duo.kv_cache.formats import FORMATS
from vllm_duo.kv_cache.layout import Layout
from vllm_duo.kv_cache.snapshot_manager import SnapshotManager

pytestmark = [
    pytest.mark.engine,
    pytest.mark.feature("quantised KV cache, of the retrieval heads alone"),
]

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
SINK, RECENT = 20, 75
MASK = mask_of("uneven", SHAPE.kv_heads)  # a layer of both classes, and one of each alone
PROMPTS = prompts_of([150] * 4, seed=43)
ANSWER_TOKENS = 90


@pytest.fixture(
    scope="module",
    params=[
        "int4_per_token_head",
        pytest.param("fp8", marks=pytest.mark.slow),
        pytest.param("int8_per_token_head", marks=pytest.mark.slow),
    ],
)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def serve(checkpoint, tmp_path_factory):
    pattern = write_pattern(tmp_path_factory.mktemp("patterns") / "uneven", MASK)

    def serve(name, streaming="model", **settings):
        sizes = {"sink_size": SINK, "recent_size": RECENT}
        limits = {"max_model_len": 400, "max_num_batched_tokens": 128}
        duo_settings = {"streaming_cache_dtype": streaming}
        return engine(
            checkpoint(SHAPE),
            pattern,
            duo_settings=duo_settings,
            kv_cache_dtype=name,
            block_size=BLOCK,
            **(sizes | limits | settings),
        )

    return serve


def error_of(model, answers, form, *, streaming_quantised=False, prompts=PROMPTS):
    oracle = Oracle(model, MASK, SINK, RECENT, form, streaming_quantised=streaming_quantised)
    return rms(errors(oracle, prompts, answers))


@dataclass(frozen=True)
class Served:
    """What an engine with room for everything answered, and what it made of its pool."""

    answers: list[Answer]
    again: list[Answer]
    hits: int
    layout: Layout
    specs: list[AttentionSpec]
    block_bytes: set[int]


@pytest.fixture(scope="module")
def served(name, serve):
    with serve(name) as running:
        answers = running.generate(PROMPTS, ANSWER_TOKENS)
        again = running.generate(PROMPTS, ANSWER_TOKENS)
        config = running.core.scheduler.kv_cache_config
        managers = running.manager.coordinator.single_type_managers
        (hits,) = {m.counts[0] for m in managers if isinstance(m, SnapshotManager)}
        return Served(
            answers,
            again,
            hits,
            getattr(running.core.scheduler, LAYOUT),
            [spec for g in config.kv_cache_groups for spec in iter_layer_specs(g.kv_cache_spec)],
            running.block_bytes(),
        )


def test_answers_are_those_of_what_is_kept(name, served, checkpoint):
    """In chunks, and the second time from snapshots."""
    model, form = checkpoint(SHAPE), FORMATS[name]
    assert served.hits == len(PROMPTS), "every prompt was resumed at a snapshot"
    for each in (served.answers, served.again):
        error = error_of(model, each, form)
        assert error <= ERROR
        assert error_of(model, each, None) > MATTERS * error, "what is kept must matter"
        both = error_of(model, each, form, streaming_quantised=True)
        assert both > MATTERS * error, "what streaming heads keep must matter"


def test_a_block_has_the_bytes_of_the_widest_group(name, served):
    """Streaming heads keep float32."""
    kinds = {(type(spec).__name__, spec.dtype.itemsize) for spec in served.specs}
    assert kinds == {("RetrievalSpec", 1), ("StreamingSpec", 4)}
    layout = served.layout
    heads = layout.shape.streaming_heads
    widest = max(sum(heads[layer] for layer in layers) for layers in layout.bins)
    bin_bytes = widest * layout.span.block_size * 2 * SHAPE.head_size * 4
    retrieval_heads = sum(map(sum, MASK))
    retrieval_bytes = retrieval_heads * BLOCK * FORMATS[name].row_bytes(SHAPE.head_size)
    assert served.block_bytes == {max(bin_bytes, retrieval_bytes)}


def test_preempted_requests_answer_the_same(name, served, serve, checkpoint, monkeypatch):
    """In a pool that holds four prompts and not their answers."""
    pool = 1 + len(PROMPTS) * served.layout.blocks(len(PROMPTS[0]) + ANSWER_TOKENS // 2)
    with serve(name, num_gpu_blocks_override=pool) as running:
        stepper = Stepper(running, monkeypatch)
        answers = stepper.ask_all(PROMPTS, max_tokens=ANSWER_TOKENS)
    assert stepper.preempted
    assert error_of(checkpoint(SHAPE), answers, FORMATS[name]) <= ERROR


def test_less_is_lost_than_with_all_heads_quantised(name, served, serve, checkpoint):
    """Against the oracle over the model's own numbers."""
    with serve(name, "same") as running:
        answers = running.generate(PROMPTS, ANSWER_TOKENS)
    model = checkpoint(SHAPE)
    lost, lost_by_all = (error_of(model, each, None) for each in (served.answers, answers))
    assert lost < lost_by_all, f"{lost} and {lost_by_all}"


@pytest.mark.slow
@pytest.mark.feature("tensor parallelism")
def test_two_ranks_keep_what_one_keeps(name, serve, checkpoint):
    """The second time the rings of both ranks are restored."""
    with serve(name, **ranks_of(2)) as running:
        answers = running.generate(PROMPTS, ANSWER_TOKENS)
        again = running.generate(PROMPTS, ANSWER_TOKENS)
    for each in (answers, again):
        error = error_of(checkpoint(SHAPE), each, FORMATS[name])
        assert error <= ERROR
        assert error_of(checkpoint(SHAPE), each, None) > MATTERS * error, "what is kept must matter"


@pytest.mark.slow
@pytest.mark.feature("speculative decoding, n-gram")
def test_drafts_change_nothing_that_is_kept(name, serve, checkpoint):
    """Text that repeats itself has n-grams to find; rejected drafts were quantised, too."""
    prompts = [prompt * 3 for prompt in prompts_of([10, 40, 90], seed=43)]
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2}
    with serve(name, speculative_config=drafts) as running:
        answers = running.generate(prompts, ANSWER_TOKENS)
    model = checkpoint(SHAPE)
    error = error_of(model, answers, FORMATS[name], prompts=prompts)
    assert error <= ERROR
    assert error_of(model, answers, None, prompts=prompts) > MATTERS * error, "it must matter"
