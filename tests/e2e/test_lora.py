"""Several LoRA adapters at once: each request gets the tokens of its adapter's merged weights."""

from __future__ import annotations

import pytest
from vllm.lora.request import LoRARequest

from tests.e2e.engine import answer_of, engine, write_pattern
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.models.adapters import RANK, make_adapter, merge
from tests.models.random_models import Shape
from tests.oracle import Oracle, mismatches

pytestmark = pytest.mark.engine

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
SINK, RECENT = 20, 75
MASK = mask_of("mixed", SHAPE.kv_heads)
ADAPTERS = ("first", "second", "third")
PROMPTS = prompts_of([19, 150, 333], seed=30)
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
def oracles(base, adapters, tmp_path_factory):
    """Adapter to oracle; None is the model alone."""
    folder = tmp_path_factory.mktemp("merged")
    merged = {name: merge(base, path, folder / name) for name, path in adapters.items()}
    return {
        name: Oracle(model, MASK, SINK, RECENT) for name, model in {None: base, **merged}.items()
    }


@pytest.fixture(scope="module")
def running(base, tmp_path_factory):
    pattern = write_pattern(tmp_path_factory.mktemp("pattern"), MASK)
    with engine(
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
    ) as started:
        yield started


@pytest.fixture
def ask(running, adapters):
    """Sends (prompt, adapter) pairs together; answers and the tokens taken from the prefix cache."""
    assert running.llm.reset_prefix_cache()

    def ask(*pairs):
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


@pytest.mark.feature("LoRA adapters")
def test_adapters_and_the_model_alone_in_one_batch(ask, oracles):
    pairs = [(prompt, name) for prompt in PROMPTS for name in (None, *ADAPTERS)]
    answers, hits = ask(*pairs)
    assert hits == [0] * len(pairs)
    assert_right(oracles, pairs, answers)
    for start in range(0, len(pairs), 4):
        assert len({answer.tokens for answer in answers[start : start + 4]}) == 4


@pytest.mark.feature("LoRA adapters", "prefix caching")
def test_a_prefix_is_shared_within_an_adapter_only(ask, oracles):
    prompt, hits = PROMPTS[1], []
    for name in ("first", "second", "first", None, "second", None):
        (answer,), (hit,) = ask((prompt, name))
        assert_right(oracles, [(prompt, name)], [answer])
        hits.append(hit)
    assert hits == [0, 0, 144, 0, 144, 144]
