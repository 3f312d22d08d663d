"""Several LoRA adapters at once: each request gets the tokens of its adapter's merged weights."""

from __future__ import annotations

import pytest
from vllm.lora.request import LoRARequest

from tests.e2e.engine import answer_of, engine, ranks_of, write_pattern
from tests.e2e.half import errors, rms
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.e2e.test_quantised_cache import ERROR, MATTERS
from tests.models.adapters import RANK, make_adapter, merge
from tests.models.random_models import Shape
from tests.oracle import Oracle, mismatches
from vllm_duo.kv_cache.formats import FORMATS

pytestmark = pytest.mark.engine

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
SINK, RECENT = 20, 75
MASK = mask_of("mixed", SHAPE.kv_heads)
ADAPTERS = ("first", "second", "third")
PROMPTS = prompts_of([19, 150, 333], seed=30)
PAIRS = [(prompt, name) for prompt in PROMPTS for name in (None, *ADAPTERS)]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def base(checkpoint):
    return checkpoint(SHAPE)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Name to folder."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(base, folder / name, seed) for seed, name in enumerate(ADAPTERS, 1)}


@pytest.fixture(scope="module")
def merged(base, adapters, tmp_path_factory):
    """Adapter to a checkpoint with it merged in; None is the model alone."""
    folder = tmp_path_factory.mktemp("merged")
    return {None: base} | {
        name: merge(base, path, folder / name) for name, path in adapters.items()
    }


@pytest.fixture(scope="module")
def oracles(merged):
    """Of each adapter."""
    return {name: Oracle(model, MASK, SINK, RECENT) for name, model in merged.items()}


@pytest.fixture(scope="module")
def serve(base, tmp_path_factory):
    pattern = write_pattern(tmp_path_factory.mktemp("pattern"), MASK)

    def serve(**settings):
        return engine(
            base,
            pattern,
            sink_size=SINK,
            recent_size=RECENT,
            enable_prefix_caching=True,
            enable_lora=True,
            max_loras=len(ADAPTERS) + 1,  # see docs/failures.md: the last slot must stay free
            max_lora_rank=RANK,
            max_num_batched_tokens=256,
            max_model_len=600,
            **settings,
        )

    return serve


@pytest.fixture(scope="module")
def ask(adapters):
    """Sends (prompt, adapter) pairs to an engine together; answers and the tokens taken from the prefix
    cache."""

    def ask(running, *pairs):
        names = [name for _, name in pairs]
        outputs = running.llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in pairs],
            running.sampling(NEW_TOKENS),
            use_tqdm=False,
            lora_request=[
                name and LoRARequest(name, ADAPTERS.index(name) + 1, str(adapters[name]))
                for name in names
            ],
        )
        return [answer_of(output) for output in outputs], [o.num_cached_tokens for o in outputs]

    return ask


def assert_right(oracles, pairs, answers):
    for (prompt, name), answer in zip(pairs, answers, strict=True):
        assert len(answer.tokens) == NEW_TOKENS
        assert mismatches(oracles[name], prompt, answer.tokens, answer.logprobs) == [], name


class TestOneEngine:
    @pytest.fixture(scope="class")
    def started(self, serve):
        with serve() as running:
            yield running

    @pytest.fixture
    def running(self, started):
        assert started.llm.reset_prefix_cache()
        return started

    @pytest.mark.feature("LoRA adapters")
    def test_adapters_and_the_model_alone_in_one_batch(self, running, ask, oracles):
        answers, hits = ask(running, *PAIRS)
        assert hits == [0] * len(PAIRS)
        assert_right(oracles, PAIRS, answers)
        for start in range(0, len(PAIRS), 4):
            assert len({answer.tokens for answer in answers[start : start + 4]}) == 4

    @pytest.mark.feature("LoRA adapters", "prefix caching")
    def test_a_prefix_is_shared_within_an_adapter_only(self, running, ask, oracles):
        prompt, hits = PROMPTS[1], []
        for name in ("first", "second", "first", None, "second", None):
            (answer,), (hit,) = ask(running, (prompt, name))
            assert_right(oracles, [(prompt, name)], [answer])
            hits.append(hit)
        assert hits == [0, 0, 144, 0, 144, 144]


@pytest.mark.slow
@pytest.mark.feature("LoRA adapters", "quantised KV cache, int8")
def test_beside_a_quantised_cache(serve, ask, merged):
    """The second time each adapter's prompts resume at snapshots of its own."""
    name = "int8_per_token_head"
    with serve(kv_cache_dtype=name) as running:
        rounds = [ask(running, *PAIRS) for _ in range(2)]
    assert [sum(hits) > 0 for _, hits in rounds] == [False, True]
    for answers, _ in rounds:
        for adapter, model in merged.items():
            own = [at for at, (_, each) in enumerate(PAIRS) if each == adapter]
            error = {
                form: rms(
                    errors(
                        Oracle(model, MASK, SINK, RECENT, FORMATS.get(form)),
                        [PAIRS[at][0] for at in own],
                        [answers[at] for at in own],
                    )
                )
                for form in (name, None)
            }
            assert error[name] <= ERROR, adapter
            assert error[None] > MATTERS * error[name], "what is kept must matter"


@pytest.mark.slow
@pytest.mark.feature("LoRA adapters", "tensor parallelism")
def test_on_two_ranks(serve, ask, oracles):
    """The second time the rings of both ranks are restored."""
    with serve(**ranks_of(2)) as running:
        rounds = [ask(running, *PAIRS) for _ in range(2)]
    assert [sum(hits) > 0 for _, hits in rounds] == [False, True]
    for answers, _ in rounds:
        assert_right(oracles, PAIRS, answers)
