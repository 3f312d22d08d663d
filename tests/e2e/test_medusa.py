"""Medusa heads: the tokens of an engine without drafts, whatever is accepted or rejected."""

from __future__ import annotations

import pytest
import torch

from tests.e2e.drafts import Outcomes
from tests.e2e.engine import engine, ranks_of, write_pattern
from tests.e2e.stepper import Stepper
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.models.medusa_heads import make_heads
from tests.models.random_models import VOCABULARY, Shape
from tests.oracle import Oracle, assert_right

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
MASK = mask_of("mixed", SHAPE.kv_heads)
SINK, RECENT = 20, 75
PROMPTS = prompts_of([19, 60, 96, 150, 333], seed=40)
ANSWER = 150
HEADS = 3


@torch.inference_mode()
def hidden_states(oracle, text):
    """[n, hidden size] the model's last, under the rule."""
    oracle.logprobs(text[:1])  # sets the rule
    return oracle.model.model(torch.tensor([text]), use_cache=False).last_hidden_state[0].clone()


@pytest.mark.engine
@pytest.mark.parametrize(
    "ranks",
    [1, pytest.param(2, marks=[pytest.mark.slow, pytest.mark.feature("tensor parallelism")])],
)
@pytest.mark.feature("speculative decoding, Medusa heads", "prefix caching", "preemption")
def test_heads_change_no_token(ranks, checkpoint, tmp_path, monkeypatch):
    """In chunks, in a pool for two and a half of the longest requests; then from cached prefixes."""
    settings = ranks_of(ranks)
    model, pattern = checkpoint(SHAPE), write_pattern(tmp_path / "mixed", MASK)
    oracle = Oracle(model, MASK, SINK, RECENT)
    with engine(model, pattern) as running:
        plain = running.generate(PROMPTS, ANSWER)
    texts = [prompt + list(each.tokens) for prompt, each in zip(PROMPTS, plain, strict=True)]
    states = [hidden_states(oracle, text) for text in texts]
    heads = make_heads(texts, states, VOCABULARY, HEADS, tmp_path / "heads")
    with engine(
        model,
        pattern,
        enable_prefix_caching=True,
        max_num_batched_tokens=100,
        max_model_len=600,
        num_gpu_blocks_override=100,
        **settings,
        speculative_config={
            "method": "medusa",
            "model": str(heads),
            "num_speculative_tokens": HEADS,
        },
    ) as running:
        stepper = Stepper(running, monkeypatch)
        outcomes = Outcomes(stepper.scheduler, monkeypatch)
        served = stepper.ask_all(PROMPTS, max_tokens=ANSWER)
        again = stepper.ask("again", PROMPTS[-1], max_tokens=ANSWER)
    assert [each.tokens for each in served] == [each.tokens for each in plain]
    assert again.tokens == plain[-1].tokens
    assert_right(oracle, PROMPTS, served, ANSWER)
    assert stepper.preempted
    assert stepper.hit("again") == 320
    assert sum(outcomes.accepted[count] for count in range(1, HEADS + 1)) > 50
    assert sum(outcomes.rejected.values()) > 50
