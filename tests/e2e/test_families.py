"""Further families of models: what differs from Llama around the attention changes no token."""

from __future__ import annotations

import pytest

from tests.e2e.engine import MAX_NEW_TOKENS, engine, write_pattern
from tests.e2e.test_exactness import LENGTHS, mask_of, prompts_of
from tests.models.random_models import Shape
from tests.oracle import Oracle, assert_right

pytestmark = pytest.mark.engine

SINK, RECENT = 20, 75
QUICK = {"gemma": "Gemma", "mixtral": "Mixtral", "phi3": "Phi-3"}
SLOW = {
    "granite": "Granite",
    "olmo2": "OLMo 2",
    "qwen3_moe": "Qwen3 MoE",
    "smollm3": "SmolLM3",
    "stablelm": "StableLM",
    "starcoder2": "StarCoder2",
}
BY_FAMILY = pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.feature(shown)) for name, shown in QUICK.items()]
    + [
        pytest.param(name, marks=[pytest.mark.feature(shown), pytest.mark.slow])
        for name, shown in SLOW.items()
    ],
)


@BY_FAMILY
def test_served_tokens_are_the_oracles(family, checkpoint, tmp_path):
    """The second time each prompt resumes at a snapshot."""
    model, mask = checkpoint(Shape(family, group=2, head_size=32, kv_heads=4)), mask_of("mixed", 4)
    prompts = prompts_of(LENGTHS)
    # First: where vLLM runs transformers' own model it wraps its class, which then can't be made anew.
    oracle = Oracle(model, mask, SINK, RECENT)
    pattern = write_pattern(tmp_path / "pattern", mask)
    with engine(
        model, pattern, sink_size=SINK, recent_size=RECENT, max_num_batched_tokens=100
    ) as running:
        answers = running.generate(prompts) + running.generate(prompts)
    assert_right(oracle, prompts * 2, answers, MAX_NEW_TOKENS)
