"""Plans of models with sliding windows of their own, against sums done by hand."""

from __future__ import annotations

import pytest

from tests.planning.models import GIB, TOKENS, by_length, checkered, write_model
from vllm_duo.planning.plan import PlanRequest, plan_memory


class TestSlidingWindows:
    """Layers with a window of the model's own."""

    def test_mistral_7b_v01(self, tmp_path):
        """32 layers x 8 heads, all with a window of 4,096 tokens; no pattern, nothing to choose.

        A run of 4,096 tokens is 32 blocks of 128 tokens of 256 heads, 16 MiB each: 2,560 in 40 GiB.
        Stock vLLM keeps the same window.
        """
        plan = plan_memory(
            PlanRequest(
                model=write_model(
                    tmp_path, 32, 32, 8, 4096, model_type="mistral", sliding_window=4096
                ),
                kv_cache_bytes=40 * GIB,
                max_model_len=TOKENS,
            )
        )
        assert (plan.settings.sparsity, plan.settings.pattern) == (1.0, "none")
        assert (plan.settings.sliding_layers, plan.settings.sliding_window) == (32, 4096)
        assert (plan.bytes_per_token, plan.constant_bytes_per_request) == (0, 256 * 4096 * 512)
        assert (plan.block_bytes, plan.window_block_sizes) == (16 * 2**20, [128])
        assert plan.concurrent_requests == 2559 / 32 == plan.full.concurrent_requests
        assert plan.longest_request_tokens is None
        assert plan.waste == 0.0
        assert by_length(plan, 1024).blocks == 8
        assert "duo holds what the model itself keeps" in plan.notes[0]

    def test_window_as_long_as_the_longest_request(self, tmp_path):
        """It hides nothing, so the pattern chooses heads in every layer."""
        plan = plan_memory(
            PlanRequest(
                model=write_model(
                    tmp_path, 32, 32, 8, 4096, model_type="mistral", sliding_window=4096
                ),
                duo={"pattern": "Mistral-7B-Instruct-v0.2"},
                kv_cache_bytes=40 * GIB,
                max_model_len=4096,
            )
        )
        assert plan.settings.sliding_layers == 0
        assert plan.bytes_per_token == 128 * 512

    def test_gemma_3_27b_shape(self, tmp_path):
        """62 layers x 16 heads of 128; every sixth of them, so 10, keeps all, half of their heads.

        A block of 128 tokens of 80 heads is 5 MiB, 8,192 of them in 40 GiB, and 10,240 tokens of a
        head. 80 heads that keep 320 tokens: one bin, 128 tokens a block, 3 blocks. 52 x 16 = 832
        heads that keep 1,024: one bin, 12 tokens a block, 86 blocks (85.3 filled). 32,768 tokens:
        256 + 3 + 86.
        Stock, all heads of the 10 layers paged: 160 heads, 10 MiB, 4,096 blocks, 24 tokens of 832
        heads: 43 blocks (ceil of 1,024 / 24), and 256.
        """
        plan = plan_memory(
            PlanRequest(
                model=write_model(
                    tmp_path / "model",
                    62,
                    32,
                    16,
                    5376,
                    model_type="gemma3_text",
                    head_dim=128,
                    sliding_window=1024,
                ),
                duo={"pattern": checkered(tmp_path / "pattern", 62, 16)},
                kv_cache_bytes=40 * GIB,
                max_model_len=TOKENS,
            )
        )
        assert (plan.settings.sliding_layers, plan.settings.sliding_window) == (52, 1024)
        assert plan.settings.sparsity == pytest.approx((832 + 80) / 992)
        assert plan.bytes_per_token == 80 * 512
        assert plan.constant_bytes_per_request == (80 * 320 + 832 * 1024) * 512
        assert (plan.block_bytes, plan.num_blocks) == (5 * 2**20, 8192)
        assert (plan.streaming_block_size, plan.window_block_sizes) == (128, [12])
        assert plan.streaming_blocks_per_request == 3 + 86
        assert plan.concurrent_requests == 8191 / (256 + 3 + 86)
        assert plan.longest_request_tokens == (8191 - 89) * 128
        needed = (80 * (TOKENS + 320) + 832 * 1024) * 512
        assert plan.waste == pytest.approx(1 - needed / (345 * 5 * 2**20))
        assert plan.full.constant_bytes_per_request == 832 * 1024 * 512
        assert plan.full.concurrent_requests == 4095 / (256 + 43)
        assert "52 of 62 layers slide over 1024 tokens" in plan.notes[0]

    def test_auto_length_of_a_model_that_slides(self, tmp_path):
        """The pool holds less than the window: the window is in force all the same, as in a server."""
        plan = plan_memory(
            PlanRequest(
                model=write_model(
                    tmp_path, 32, 32, 8, 4096, model_type="mistral", sliding_window=4096
                ),
                kv_cache_bytes=17 * 16 * 2**20,
                max_model_len="auto",
            )
        )
        assert plan.settings.max_model_len == 16 * 128
        assert plan.settings.sliding_layers == 32
