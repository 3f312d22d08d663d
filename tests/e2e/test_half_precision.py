"""Whole models in bfloat16 and float16, against stock vLLM in the same type and the float32 oracle.

Roundings flip tokens at near ties, so answers are not compared as texts. The oracle, with the same
rounded weights, is forced along each answer, and the log-probabilities that were reported may be off by
twice what stock vLLM's are (root mean square): the products around the attention round alike in both.
"""

from __future__ import annotations

import pytest
import torch

from tests.e2e.engine import engine, write_pattern
from tests.e2e.half import compared_tokens, errors, rms, rounded
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.models.random_models import Shape
from tests.oracle import Oracle

pytestmark = pytest.mark.engine

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
SINK, RECENT = 20, 75
MASKS = {name: mask_of(name, SHAPE.kv_heads) for name in ("retrieval", "mixed")}
PROMPTS = prompts_of([1, 40, 130, 300], seed=40)
NEW_TOKENS = 24
DTYPES = [
    pytest.param(name, id=name, marks=[pytest.mark.feature(f"{name}, whole models"), *marks])
    for name, marks in {"bfloat16": [], "float16": [pytest.mark.slow]}.items()
]


class Served:
    """The answers of stock vLLM (None) and of each mask, and their errors."""

    def __init__(self, model, dtype, folder):
        self.model, self.answers = model, {}
        for name, mask in {"stock": None, **MASKS}.items():
            pattern = mask and write_pattern(folder / name, mask)
            with engine(
                model,
                pattern,
                sink_size=SINK,
                recent_size=RECENT,
                dtype=dtype,
                block_size=128,
                num_gpu_blocks_override=100,
                max_model_len=400,
                max_num_batched_tokens=128,
            ) as running:
                self.answers[name] = running.generate(PROMPTS, NEW_TOKENS)

    def errors(self, name, mask):
        """Of the log-probabilities of these answers, from those of the oracle with this mask."""
        oracle = Oracle(self.model, MASKS[mask], SINK, RECENT)
        return errors(oracle, PROMPTS, self.answers[name])


@pytest.fixture(scope="module", params=DTYPES)
def served(request, checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = rounded(checkpoint(SHAPE), getattr(torch, request.param), folder / "model")
    return Served(model, request.param, folder)


def test_all_retrieval_is_as_near_to_the_oracle_as_stock(served):
    stock = served.errors("stock", "retrieval")
    duo = served.errors("retrieval", "retrieval")
    assert rms(duo) <= 2 * rms(stock)


def test_all_retrieval_chooses_stocks_tokens_up_to_near_ties(served):
    # A tie of two tokens may be decided by four errors: of both tokens, in both engines.
    tie = 4 * float(served.errors("stock", "retrieval").abs().max())
    same = compared_tokens(served.answers["retrieval"], served.answers["stock"], tie)
    assert same >= len(PROMPTS) * NEW_TOKENS / 4, "too few to say anything"


def test_streaming_heads_are_as_near_to_the_oracle(served):
    allowed = 2 * rms(served.errors("stock", "retrieval"))
    assert rms(served.errors("mixed", "mixed")) <= allowed
    assert rms(served.errors("mixed", "retrieval")) > 4 * allowed, "the masks must matter"
