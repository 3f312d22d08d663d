"""What speculative decoding adds to a plan, against sums done by hand."""

from __future__ import annotations

import pytest

from tests.planning.models import GIB, TOKENS, by_length, write_model
from vllm_duo.planning.plan import PlanRequest, plan_memory
from vllm_duo.planning.schema import Plan


class TestDrafts:
    def plan(self, tmp_path, **settings) -> Plan:
        return plan_memory(
            PlanRequest(
                model=write_model(tmp_path / "model", 32, 32, 8, 4096),
                kv_cache_bytes=40 * GIB,
                max_model_len=TOKENS,
                **{"duo": {"pattern": "Meta-Llama-3.1-8B-Instruct"}, **settings},
            )
        )

    def test_rings_are_longer(self, tmp_path):
        """320 tokens and 64 drafts are 3 blocks of 128; another draft is one more."""
        assert by_length(self.plan(tmp_path, num_speculative_tokens=64), TOKENS).blocks == 259
        assert by_length(self.plan(tmp_path, num_speculative_tokens=65), TOKENS).blocks == 260

    def test_a_draft_models_tokens_stay(self, tmp_path):
        """16 layers x 8 heads of 64: 128 heads of 256 bytes a token, beside 128 of 512.

        A block of 128 tokens is 12 MiB, 3,413 of them in 40 GiB. It has 12 MiB / 64 KiB = 192
        streaming tokens, so 324 slots are 2 blocks.
        """
        draft = write_model(tmp_path / "draft", 16, 32, 8, 2048)
        plan = self.plan(tmp_path, num_speculative_tokens=4, draft_model=draft)
        assert plan.bytes_per_token == 128 * 512 + 128 * 256
        assert (plan.block_bytes, plan.num_blocks) == (12 * 2**20, 3413)
        assert plan.concurrent_requests == 3412 / 258
        assert plan.full.bytes_per_token == 256 * 512 + 128 * 256
        # 20 MiB a block of stock's.
        assert plan.full.concurrent_requests == 2047 / 256
        assert plan.settings.draft_model == draft

    def test_an_eagle_head_is_a_draft_model(self, tmp_path):
        """One layer of 8 heads of 128: a block is half a MiB more, and 4,818 of them are 40 GiB."""
        head = write_model(
            tmp_path / "head", 1, 32, 8, 4096, architectures=["LlamaForCausalLMEagle3"]
        )
        plan = self.plan(tmp_path, num_speculative_tokens=4, draft_model=head)
        assert plan.bytes_per_token == 128 * 512 + 8 * 512
        assert (plan.block_bytes, plan.num_blocks) == (17 * 2**19, 4818)
        assert plan.concurrent_requests == 4817 / 259

    @pytest.mark.parametrize(
        ("own", "draft_bytes"), [(None, 136), ("int4_per_token_head", 72), ("auto", 256)]
    )
    def test_a_draft_models_tokens_are_quantised(self, tmp_path, own, draft_bytes):
        """By default as the server's: 264 bytes in a head of 128, 136 in the draft model's of 64."""
        plan = self.plan(
            tmp_path,
            num_speculative_tokens=4,
            draft_model=write_model(tmp_path / "draft", 16, 32, 8, 2048),
            kv_cache_dtype="int8_per_token_head",
            draft_kv_cache_dtype=own,
        )
        assert plan.bytes_per_token == 128 * 264 + 128 * draft_bytes
        assert plan.full.bytes_per_token == 256 * 264 + 128 * draft_bytes
        assert plan.settings.draft_kv_cache_dtype == own
        # 20 MiB a block of stock's with both models in bf16, as without a quantised cache.
        unquantised = plan.concurrent_requests / plan.times_unquantised_full_attention
        assert unquantised == pytest.approx(2047 / 256)

    def test_a_draft_models_cache_that_the_server_refuses(self, tmp_path):
        plan = self.plan(
            tmp_path,
            num_speculative_tokens=4,
            draft_model=write_model(tmp_path / "draft", 16, 32, 8, 2048),
            draft_kv_cache_dtype="float16",
        )
        assert plan.notes == [
            "this release's server refuses --draft-kv-cache-dtype float16 for a model in bfloat16: "
            "use auto"
        ]

    def test_a_draft_model_that_the_server_refuses(self, tmp_path):
        draft = write_model(
            tmp_path / "draft", 16, 32, 8, 2048, model_type="mistral", sliding_window=64
        )
        with pytest.raises(NotImplementedError, match="what drafts: the model's own sliding"):
            self.plan(tmp_path, num_speculative_tokens=4, draft_model=draft)

    def test_ranks_share_a_draft_models_heads(self, tmp_path):
        """64 retrieval heads of 512 bytes and 16 x 4 drafting ones of 256 a rank: 6 MiB a block."""
        plan = self.plan(
            tmp_path,
            duo={"pattern": "Meta-Llama-3.1-8B-Instruct", "balance": True},
            num_speculative_tokens=4,
            draft_model=write_model(tmp_path / "draft", 16, 32, 8, 2048),
            tensor_parallel_size=2,
        )
        assert plan.block_bytes == 128 * (64 * 512 + 16 * 4 * 256) == 6 * 2**20
        assert plan.tensor_parallel_loss == 0

    def test_a_draft_models_heads_that_cannot_be_split(self, tmp_path):
        draft = write_model(tmp_path / "draft", 16, 30, 3, 1920)
        with pytest.raises(NotImplementedError, match="what drafts: 3 KV heads cannot be split"):
            self.plan(tmp_path, num_speculative_tokens=4, draft_model=draft, tensor_parallel_size=2)

    def test_a_draft_model_in_several_stages_is_what_the_server_refuses(self, tmp_path):
        draft = write_model(tmp_path / "draft", 16, 32, 8, 2048)
        settings = {"num_speculative_tokens": 4, "pipeline_parallel_size": 2}
        with pytest.raises(NotImplementedError, match="what drafts: --pipeline-parallel-size 2"):
            self.plan(tmp_path, draft_model=draft, **settings)

    def test_a_draft_model_beside_layers_that_are_left_out(self, tmp_path):
        draft = write_model(tmp_path / "draft", 16, 32, 8, 2048)
        settings = {"num_speculative_tokens": 4, "skip_layers": ["0"], "kv_cache_dtype": "fp8"}
        with pytest.raises(NotImplementedError, match="what drafts: --kv-cache-dtype-skip-layers"):
            self.plan(tmp_path, draft_model=draft, **settings)
