"""Quantised weights: duo gives stock vLLM's tokens, and streaming heads those of the rule.

The oracle has the float32 values that the checkpoint stands for, and rounds inputs where the served
model does. Roundings of the served model, and sums in another order that move an input across the edge
of one, flip tokens at near ties: as in test_half_precision, log-probabilities may be off the
oracle's by twice what stock vLLM's are.
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

pytestmark = pytest.mark.engine

SHAPES = {
    "llama": Shape("llama", group=2, head_size=32, kv_heads=4),
    # Two layers of three slide, and learned sinks.
    "gpt_oss": Shape("gpt_oss", group=2, head_size=32, kv_heads=4, window=50),
}
SINK, RECENT = 20, 75
MASKS = {name: mask_of(name, 4) for name in ("retrieval", "mixed")}
PROMPTS = prompts_of([1, 40, 130, 300], seed=41)
NEW_TOKENS = 32
MOST = 0.3
"""Twice stock vLLM's error: 0.21 (int8) and 0.19 (4 bits) were measured in bfloat16."""

# Where there is AMX, vLLM's int8 product takes 16-bit inputs alone.
AMX = torch.cpu._is_amx_tile_supported()
INT8_DTYPE = "bfloat16" if AMX else "float32"
FOUR_BITS = [pytest.mark.feature("quantised weights, 4 bits"), pytest.mark.avx512]
FORMATS = [
    pytest.param(
        ("int8", INT8_DTYPE, "llama"),
        id="int8",
        marks=pytest.mark.feature("quantised weights, int8"),
    ),
    pytest.param(("gptq", "bfloat16", "llama"), id="gptq", marks=FOUR_BITS),
    pytest.param(("awq", "bfloat16", "llama"), id="awq", marks=FOUR_BITS),
    pytest.param(
        ("mxfp4", "bfloat16", "gpt_oss"),
        id="mxfp4",
        marks=[pytest.mark.feature("quantised weights, MXFP4"), pytest.mark.slow],
    ),
]


class Served:
    """One format: its models, stock vLLM's answers and their errors."""

    def __init__(self, name, dtype, model, windows, folder):
        self.dtype, self.folder = dtype, folder
        self.models = quantise(model, folder / "models", name)
        self.oracle = Oracle(self.models[1], MASKS["retrieval"], SINK, RECENT, windows=windows)
        if name == "int8":
            quantise_inputs(self.oracle.model)
        with self.engine() as running:
            quantised = running.llm.llm_engine.vllm_config.quant_config
            assert quantised is not None
            self.stock = running.generate(PROMPTS, NEW_TOKENS)
        stock_errors = self.errors(self.stock, "retrieval")
        self.allowed = 2 * rms(stock_errors)
        assert self.allowed <= MOST, "the oracle has other weights than the served model"
        # A tie of two tokens may be decided by four errors: of both tokens, in both engines.
        self.tie = 4 * float(stock_errors.abs().max())

    def engine(self, mask=None, **settings):
        pattern = mask and write_pattern(self.folder / mask, MASKS[mask])
        sizes = {"sink_size": SINK, "recent_size": RECENT, "dtype": self.dtype}
        limits = {"max_model_len": 400, "max_num_batched_tokens": 128}
        pool = {"block_size": 128, "num_gpu_blocks_override": 100}
        return engine(self.models[0], pattern, **(sizes | limits | pool | settings))

    def errors(self, answers, mask, prompts=PROMPTS):
        """Of the log-probabilities, from those of the oracle with this mask."""
        self.oracle.retrieval = np.asarray(MASKS[mask])
        return errors(self.oracle, prompts, answers)


@pytest.fixture(scope="module", params=FORMATS)
def served(request, checkpoint, tmp_path_factory):
    name, dtype, family = request.param
    if name == "mxfp4" and not AMX:
        pytest.skip("vLLM multiplies MXFP4 on CPUs with AMX alone")
    shape, folder = SHAPES[family], tmp_path_factory.mktemp(name)
    return Served(name, dtype, checkpoint(shape), shape.windows, folder)


def test_all_retrieval_gives_stocks_tokens(served):
    with served.engine("retrieval") as running:
        duo = running.generate(PROMPTS, NEW_TOKENS)
    assert rms(served.errors(duo, "retrieval")) <= served.allowed
    same = compared_tokens(duo, served.stock, served.tie)
    assert same >= len(PROMPTS) * NEW_TOKENS / 4, "too few to say anything"


def test_streaming_heads_follow_the_rule_and_accounts_hold(served, monkeypatch):
    """In a pool that holds four prompts and not their answers, looked at after every step."""
    prompts, answer_tokens = prompts_of([150] * 4, seed=42), 90
    with served.engine("mixed", block_size=16, num_gpu_blocks_override=60) as running:
        stepper = Stepper(running, monkeypatch)
        answers = stepper.ask_all(prompts, max_tokens=answer_tokens)
    assert stepper.preempted
    assert rms(served.errors(answers, "mixed", prompts)) <= served.allowed
    unseen = rms(served.errors(answers, "retrieval", prompts))
    assert unseen > 4 * served.allowed, "the masks must matter"
