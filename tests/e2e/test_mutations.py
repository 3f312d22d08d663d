"""The exactness test must see one token of difference in what streaming heads keep."""

from __future__ import annotations

import dataclasses

import pytest

from tests.e2e.engine import engine, write_pattern
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.models.random_models import Shape
from tests.oracle import Oracle, mismatches

pytestmark = pytest.mark.engine

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
MUTATIONS = {
    "sink_size - 1": {"sink_size": 19},
    "sink_size + 1": {"sink_size": 21},
    "recent_size - 1": {"recent_size": 74},
    # One slot more: the ring's blocks of 16 tokens have room for it.
    "recent_size + 1": {"recent_size": 76, "ring_size": 76},
}


def test_one_token_more_or_less_is_seen(checkpoint, tmp_path, monkeypatch):
    from vllm_duo.attention.metadata import DuoMetadataBuilder
    from vllm_duo.ops.batch import RingTable

    model = checkpoint(SHAPE)
    mask = mask_of("mixed", SHAPE.kv_heads)
    oracle = Oracle(model, mask, 20, 75)
    prompts = prompts_of([130, 333], seed=7)
    make_table = DuoMetadataBuilder._make_table

    def wrong(answers):
        pairs = zip(prompts, answers, strict=True)
        return [mismatches(oracle, p, a.tokens, a.logprobs) for p, a in pairs]

    with engine(model, write_pattern(tmp_path, mask), max_num_batched_tokens=100) as running:
        assert wrong(running.generate(prompts)) == [[], []]
        for name, change in MUTATIONS.items():

            def mutated(self, common, change=change):
                table = make_table(self, common)
                if isinstance(table, RingTable):
                    return dataclasses.replace(table, **change)
                return table

            with monkeypatch.context() as patch:
                patch.setattr(DuoMetadataBuilder, "_make_table", mutated)
                found = wrong(running.generate(prompts))
            assert all(found), f"{name} went unnoticed"
