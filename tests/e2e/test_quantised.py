"""int8 weights and inputs: duo gives stock vLLM's tokens, and streaming heads those of the rule.

A sum in another order may move an input across the edge of a rounding step, so log-probabilities of the
served model and of the oracle, which rounds alike, differ by more than float32's own errors.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.e2e.engine import engine, write_pattern
from tests.e2e.half import compared_tokens, errors, rms
from tests.e2e.stepper import Stepper
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.models.quantised import quantise, quantise_inputs
from tests.models.random_models import Shape
from tests.oracle import Oracle

pytestmark = [
    pytest.mark.engine,
    pytest.mark.feature("quantised weights, int8"),
    pytest.mark.skipif(
        torch.cpu._is_amx_tile_supported(),
        reason="where there is AMX vLLM's int8 product takes 16-bit inputs alone, the oracle float32",
    ),
]

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
SINK, RECENT = 20, 75
MASKS = {name: mask_of(name, SHAPE.kv_heads) for name in ("retrieval", "mixed")}
PROMPTS = prompts_of([1, 40, 130, 300], seed=41)
NEW_TOKENS = 32
ERROR = 0.05
TIE = 0.1


@pytest.fixture(scope="module")
def models(checkpoint, tmp_path_factory):
    return quantise(checkpoint(SHAPE), tmp_path_factory.mktemp("quantised"))


@pytest.fixture(scope="module")
def error_of(models):
    """Root mean square of the errors of answers, by the oracle with a mask."""
    oracle = Oracle(models[1], MASKS["retrieval"], SINK, RECENT)
    quantise_inputs(oracle.model)

    def error_of(answers, mask, prompts=PROMPTS):
        oracle.retrieval = np.asarray(MASKS[mask])
        return rms(errors(oracle, prompts, answers))

    return error_of


@pytest.fixture(scope="module")
def serve(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("patterns")

    def serve(mask=None, **settings):
        pattern = mask and write_pattern(folder / mask, MASKS[mask])
        sizes = {"sink_size": SINK, "recent_size": RECENT}
        limits = {"max_model_len": 400, "max_num_batched_tokens": 128}
        pool = {"block_size": 128, "num_gpu_blocks_override": 100}
        return engine(models[0], pattern, **(sizes | limits | pool | settings))

    return serve


@pytest.fixture(scope="module")
def stock(serve):
    with serve() as running:
        assert running.llm.llm_engine.vllm_config.quant_config is not None
        return running.generate(PROMPTS, NEW_TOKENS)


def test_all_retrieval_gives_stocks_tokens(serve, stock, error_of):
    with serve("retrieval") as running:
        duo = running.generate(PROMPTS, NEW_TOKENS)
    assert error_of(duo, "retrieval") <= ERROR
    assert compared_tokens(duo, stock, TIE) >= len(PROMPTS) * NEW_TOKENS / 2


def test_streaming_heads_follow_the_rule_and_accounts_hold(serve, error_of, monkeypatch):
    """In a pool that holds four prompts and not their answers, looked at after every step."""
    prompts, answer_tokens = prompts_of([150] * 4, seed=42), 90
    with serve("mixed", block_size=16, num_gpu_blocks_override=60) as running:
        stepper = Stepper(running, monkeypatch)
        for index, prompt in enumerate(prompts):
            stepper.add(str(index), prompt, max_tokens=answer_tokens)
        stepper.run()
        answers = [stepper.answer(str(index)) for index in range(len(prompts))]
    assert stepper.preempted
    assert error_of(answers, "mixed", prompts) <= ERROR
    assert error_of(answers, "retrieval", prompts) > 10 * ERROR, "the masks must matter"
