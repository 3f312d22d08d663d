"""Request lengths that a plan is made for, chosen or found."""

from __future__ import annotations

import pytest

from tests.planning.models import GIB, by_length, write_model
from vllm_duo.planning.plan import PlanRequest, plan_memory
from vllm_duo.planning.schema import Plan


class TestLengths:
    def plan(self, tmp_path, **settings) -> Plan:
        return plan_memory(
            PlanRequest(
                **{
                    "model": write_model(tmp_path, 32, 32, 8, 4096),
                    "duo": {"pattern": "Meta-Llama-3.1-8B-Instruct"},
                    "kv_cache_bytes": 100 * 8 * 2**20,  # 100 blocks
                }
                | settings
            )
        )

    def test_model_length_is_the_default(self, tmp_path):
        assert self.plan(tmp_path).settings.max_model_len == 131_072

    def test_auto_is_what_fits(self, tmp_path):
        # 99 blocks, 3 of them for the streaming heads.
        assert self.plan(tmp_path, max_model_len="auto").settings.max_model_len == 96 * 128

    def test_auto_is_at_most_the_models(self, tmp_path):
        plan = self.plan(tmp_path, max_model_len="auto", kv_cache_bytes=1024 * GIB)
        assert plan.settings.max_model_len == 131_072

    def test_auto_needs_room_for_one_token(self, tmp_path):
        with pytest.raises(ValueError, match="expected a pool for at least one token"):
            self.plan(tmp_path, max_model_len="auto", kv_cache_bytes=2**20)

    def test_pool_too_small_is_noted(self, tmp_path):
        (note,) = self.plan(tmp_path).notes
        assert note.endswith("would not start: the longest that fits has 12288 tokens")

    def test_those_asked_for_and_the_longest(self, tmp_path):
        plan = self.plan(tmp_path, lengths=(5000, 100), max_model_len=8192)
        assert [length.tokens for length in plan.by_length] == [100, 5000, 8192]

    def test_doubles_by_default(self, tmp_path):
        plan = self.plan(tmp_path, max_model_len=5000)
        assert [length.tokens for length in plan.full.by_length] == [1024, 2048, 4096, 5000]

    def test_sizes_beyond_the_longest_request_are_cut_to_it(self, tmp_path):
        # 100 tokens are one block of both classes.
        plan = self.plan(tmp_path, max_model_len=100)
        assert by_length(plan, 100).blocks == 2
