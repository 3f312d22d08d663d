"""``vllm-duo plan`` against what vLLM's own start-up and scheduler do, exact to one block."""

from __future__ import annotations

import re
from dataclasses import asdict

import pytest
from vllm.v1.core import kv_cache_utils

from benchmarks.simulated_config import SHAPES, cache_specs, make_config
from benchmarks.simulated_engine import make_engine
from tests.kv_cache.test_capacity import TOKENS, counted, settings_of
from tests.planning.models import write_model
from vllm_duo import plugin
from vllm_duo.planning.plan import PlanRequest, plan_memory
from vllm_duo.planning.schema import LengthPlan, Plan

CASES = [("llama-3.1-8b", 0.5), ("llama-2-7b", 0.75), ("llama-3.1-8b", 1.0)]


@pytest.fixture
def plan_of(tmp_path):
    """The plan of a shape's server."""

    def plan_of(
        name: str,
        sparsity: float,
        block_size: int,
        pool_bytes: int,
        max_model_len: int | str,
        **settings,
    ) -> Plan:
        shape = asdict(SHAPES[name])
        heads, size = shape["num_heads"], shape["head_size"]
        model = write_model(
            tmp_path, shape["num_layers"], heads, shape["num_kv_heads"], heads * size
        )
        return plan_memory(
            PlanRequest(
                model=model,
                duo={"pattern": shape["pattern"], "sparsity": sparsity},
                kv_cache_bytes=pool_bytes,
                block_size=block_size,
                max_model_len=max_model_len,
                **settings,
            )
        )

    return plan_of


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize(("shape", "sparsity"), CASES[:2])
def test_requests_before_the_first_preemption(plan_of, shape, sparsity, block_size, prefix_caching):
    settings = settings_of(shape, sparsity, block_size, prefix_caching)
    duo = counted(settings, "duo")
    plan = plan_of(shape, sparsity, block_size, settings.pool_bytes, TOKENS)
    assert plan.num_blocks == duo.pool_blocks
    assert int(plan.concurrent_requests) == duo.resident
    assert plan.by_length[-1].blocks * duo.resident == duo.held_blocks
    assert int(plan.full.concurrent_requests) == settings.stock_requests


@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("tokens", [61, 1025])
@pytest.mark.parametrize(("shape", "sparsity"), CASES[:2])
def test_one_block_decides(plan_of, shape, sparsity, tokens, prefix_caching):
    """In a pool for exactly six requests six are admitted, with one block less five.

    The lengths are such that the few tokens that are generated need no block of their own.
    """
    block_size, longest, wanted = 16, tokens + 4, 6

    def plan(pool_bytes: int) -> tuple[Plan, LengthPlan]:
        found = plan_of(shape, sparsity, block_size, pool_bytes, longest, lengths=(tokens,))
        return found, found.by_length[0]

    roomy, request = plan(2**34)
    for missing in (0, 1):
        pool_bytes = (1 + wanted * request.blocks - missing) * roomy.block_bytes
        engine = make_engine(
            "duo",
            shape,
            sparsity=sparsity,
            pool_bytes=pool_bytes,
            block_size=block_size,
            max_model_len=longest,
            max_num_batched_tokens=10 * tokens,
            prefix_caching=prefix_caching,
        )
        for index in range(wanted + 2):
            prompt = [(index * 7919 + position) % 251 for position in range(tokens)]
            engine.add(str(index), prompt, max_tokens=4)
        # With prefix caching a step's snapshots may keep a request out of that same step.
        steps = [engine.step() for _ in range(3)]
        assert not any(step.preempted for step in steps)
        assert engine.prefilled() == wanted - missing
        assert int(plan(pool_bytes)[1].concurrent_requests) == wanted - missing


@pytest.mark.parametrize(("drafts", "blocks"), [(64, 24 + 3), (65, 24 + 4)])
def test_slots_for_drafts_are_counted(plan_of, drafts, blocks):
    """320 slots and 64 for drafts are three blocks of 128; one more is a block."""
    plan = plan_of("llama-3.1-8b", 0.5, 128, 2**34, 3000, num_speculative_tokens=drafts)
    assert plan.by_length[-1].blocks == blocks
    settings = {"max_model_len": 3000, "num_speculative_tokens": drafts}
    pool_bytes = (1 + blocks) * plan.block_bytes
    make_engine("duo", "llama-3.1-8b", pool_bytes=pool_bytes, **settings)
    with pytest.raises(ValueError, match="To serve at least one request"):
        make_engine("duo", "llama-3.1-8b", pool_bytes=pool_bytes - 1, **settings)


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize(("shape", "sparsity"), CASES)
class TestStartUp:
    """A pool of one request of 3,000 tokens, and of a byte less."""

    LENGTH = 3000

    def pool_bytes(self, plan_of, *case) -> int:
        plan = plan_of(*case, 2**34, self.LENGTH)
        return (1 + plan.by_length[-1].blocks) * plan.block_bytes

    def test_pool_of_one_request_starts(self, plan_of, shape, sparsity, block_size):
        pool_bytes = self.pool_bytes(plan_of, shape, sparsity, block_size)
        make_engine(
            *("duo", shape),
            sparsity=sparsity,
            pool_bytes=pool_bytes,
            block_size=block_size,
            max_model_len=self.LENGTH,
        )
        plan = plan_of(shape, sparsity, block_size, pool_bytes, self.LENGTH)
        assert plan.concurrent_requests == 1
        assert plan.notes == []

    def test_a_byte_less_is_refused_with_the_planned_length(
        self, plan_of, shape, sparsity, block_size
    ):
        pool_bytes = self.pool_bytes(plan_of, shape, sparsity, block_size) - 1
        with pytest.raises(ValueError, match="To serve at least one request") as caught:
            make_engine(
                *("duo", shape),
                sparsity=sparsity,
                pool_bytes=pool_bytes,
                block_size=block_size,
                max_model_len=self.LENGTH,
            )
        told = re.search(r"estimated maximum model length is (\d+)", str(caught.value))
        plan = plan_of(shape, sparsity, block_size, pool_bytes, self.LENGTH)
        assert plan.concurrent_requests < 1
        assert int(told[1]) == plan.longest_request_tokens

    @pytest.mark.parametrize("missing", [0, 1])
    def test_auto_length(self, plan_of, shape, sparsity, block_size, missing):
        pool_bytes = self.pool_bytes(plan_of, shape, sparsity, block_size) - missing
        plugin.register()
        pattern = SHAPES[shape].pattern
        config = make_config(
            SHAPES[shape],
            {"pattern": pattern, "sparsity": sparsity},
            max_model_len=131_072,
            block_size=block_size,
        )
        config.model_config.original_max_model_len = -1  # --max-model-len auto
        specs, _ = cache_specs(config, "duo")
        kv_cache_utils.get_kv_cache_configs(config, [specs], [pool_bytes])
        plan = plan_of(shape, sparsity, block_size, pool_bytes, "auto")
        assert config.model_config.max_model_len == plan.settings.max_model_len
