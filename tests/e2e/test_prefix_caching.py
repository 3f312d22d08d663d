"""Prefix hits: the answers of a cold cache, whatever was stored, evicted or preempted before."""

from __future__ import annotations

import random

import pytest

from tests.e2e.engine import MAX_NEW_TOKENS, answer_of, engine, write_pattern
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.models.random_models import Shape
from tests.oracle import Oracle, assert_right

pytestmark = pytest.mark.engine

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
SINK, RECENT = 20, 75
MASKS = {name: mask_of(name, SHAPE.kv_heads) for name in ("mixed",)}
MASKS["streaming"] = [[False] * SHAPE.kv_heads for _ in MASKS["mixed"]]


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint(SHAPE)


@pytest.fixture(scope="module")
def pattern_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patterns")
    return {name: write_pattern(folder / name, mask) for name, mask in MASKS.items()}


def oracle_of(model, name="mixed"):
    return Oracle(model, MASKS[name], SINK, RECENT)


class Cached:
    """Runs prompts one after another and notes how many tokens vLLM took from its cache."""

    def __init__(self, running):
        self.running = running

    def ask(self, prompts, max_tokens=MAX_NEW_TOKENS):
        outputs = self.running.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            self.running.sampling(max_tokens),
            use_tqdm=False,
        )
        return [answer_of(output) for output in outputs], [o.num_cached_tokens for o in outputs]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("chunk", [100, 2048])
@pytest.mark.feature("prefix caching")
def test_turns_of_a_chat_resume_where_the_last_one_ended(chunk, name, model, pattern_of):
    rng = random.Random(7)
    history, prompts, answers, hits = [], [], [], []
    with engine(
        model, pattern_of[name], enable_prefix_caching=True, max_num_batched_tokens=chunk
    ) as running:
        for turn in (700, 50, 170, 33):
            prompt = history + [rng.randrange(3, 200) for _ in range(turn)]
            (answer,), (cached,) = Cached(running).ask([prompt])
            prompts.append(prompt)
            answers.append(answer)
            hits.append(cached)
            history = prompt + list(answer.tokens)
    # At least what was there before the last answer, down to a whole block.
    ends = [0] + [len(prompt) // 16 * 16 for prompt in prompts[:-1]]
    assert all(hit >= end for hit, end in zip(hits, ends, strict=True)), (hits, ends)
    assert_right(oracle_of(model, name), prompts, answers)


@pytest.mark.feature("prefix caching")
def test_prompts_that_arrive_at_once_share_what_the_first_computes(model, pattern_of):
    """Requests resume in the very step that computes and stores the state they resume at."""
    shared = prompts_of([1100], seed=8)[0]
    prompts = [shared + tail for tail in prompts_of([31, 1, 200, 17, 64, 90, 120, 16], seed=9)]
    with engine(
        model, pattern_of["mixed"], enable_prefix_caching=True, max_num_batched_tokens=512
    ) as running:
        answers, hits = Cached(running).ask(prompts, 16)
    assert hits[0] == 0
    assert min(hits[1:]) >= 1024
    assert hits.count(1088) >= 5
    assert_right(oracle_of(model), prompts, answers)


def test_a_branch_found_once_is_hit_the_next_time(model, pattern_of):
    shared = prompts_of([700], seed=10)[0]
    prompts = [shared + tail for tail in prompts_of([300, 310, 320], seed=11)]
    with engine(model, pattern_of["mixed"], enable_prefix_caching=True) as running:
        answers, hits = [], []
        for prompt in prompts:
            answer, cached = Cached(running).ask([prompt], 16)
            answers += answer
            hits += cached
    assert hits == [0, 0, 688]
    assert_right(oracle_of(model), prompts, answers)


def test_the_same_prompt_twice(model, pattern_of):
    prompts = prompts_of([10, 16, 17, 32, 95, 96, 700], seed=12)
    with engine(model, pattern_of["mixed"], enable_prefix_caching=True) as running:
        for _ in range(2):
            answers, hits = Cached(running).ask(prompts, 16)
            assert_right(oracle_of(model), prompts, answers)
    assert hits == [(len(prompt) - 1) // 16 * 16 for prompt in prompts]


@pytest.mark.feature("prefix caching", "preemption")
def test_a_small_pool_evicts_and_preempts_and_stays_right(model, pattern_of):
    rng = random.Random(13)
    shared = prompts_of([200, 260], seed=14)
    prompts = [
        rng.choice(shared)[: rng.randrange(50, 261)] + tail
        for tail in prompts_of([rng.randrange(1, 200) for _ in range(40)], seed=15)
    ]
    with engine(
        model,
        pattern_of["mixed"],
        enable_prefix_caching=True,
        max_model_len=600,
        max_num_batched_tokens=128,
        num_gpu_blocks_override=200,
    ) as running:
        preempted = running.record_preemptions()
        answers, hits = Cached(running).ask(prompts)
        running.check_pool(idle=True)
    assert preempted
    assert sum(hits) > 1000
    assert_right(oracle_of(model), prompts, answers)
