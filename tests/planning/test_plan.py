"""The plan's figures against sums done by hand: nothing here calls the layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.planning.models import GIB, TOKENS, by_length, checkered, write_model
from tests.server.configs import cache_scheme
from vllm_duo.planning.plan import PlanRequest, plan_memory
from vllm_duo.planning.schema import LengthPlan, MemoryPlan, Plan, PlanSettings

PLAN_MD = Path(__file__).resolve().parents[2] / "docs" / "plan.md"


def test_llama_31_8b(tmp_path):
    """32 layers x 8 heads: 256, of which 128 stream. A head's token is 2 x 128 x 2 = 512 bytes.

    A block of 128 tokens of 128 heads is 8 MiB, so 40 GiB are 5,120 of them, one is vLLM's. 320
    tokens of 128 streaming heads are 2.5 blocks, so 3. 32,768 tokens: 256 + 3 = 259 blocks. Stock:
    256 heads, 16 MiB a block, 2,560 blocks, 256 a request.
    """
    plan = plan_memory(
        PlanRequest(
            model=write_model(tmp_path, 32, 32, 8, 4096),
            duo={"pattern": "Meta-Llama-3.1-8B-Instruct", "sparsity": 0.5},
            kv_cache_bytes=40 * GIB,
            max_model_len=TOKENS,
        )
    )
    assert plan.bytes_per_token == 128 * 512 == 65_536
    assert plan.constant_bytes_per_request == 128 * 320 * 512 == 20_971_520
    assert (plan.block_bytes, plan.num_blocks) == (8 * 2**20, 5120)
    assert plan.concurrent_requests == 5119 / 259
    assert plan.tokens_that_fit == 5119 * TOKENS // 259
    needed, held = 128 * 512 * (TOKENS + 320), 259 * 8 * 2**20
    assert plan.waste == pytest.approx(1 - needed / held)
    assert plan.longest_request_tokens == (5119 - 3) * 128
    assert (plan.full.bytes_per_token, plan.full.constant_bytes_per_request) == (131_072, 0)
    assert plan.full.concurrent_requests == 2559 / 256
    assert plan.full.longest_request_tokens == 2559 * 128
    assert plan.times_full_attention == (5119 / 259) / (2559 / 256)
    # 4,096 tokens: 32 + 3 blocks; 1,024 tokens: 8 + 3.
    assert by_length(plan, 4096).concurrent_requests == 5119 / 35
    assert by_length(plan, 1024).held_bytes == 11 * 8 * 2**20


def test_llama_2_7b(tmp_path):
    """32 layers x 32 heads: 1,024, of which 768 stream at 75 %, a token of a head 512 bytes.

    A block of 128 tokens of 256 heads is 16 MiB, 2,560 of them in 40 GiB. 320 tokens of 768 heads
    are 7.5 such blocks, so 8 at best. Stock: 64 MiB, 640 blocks.
    """
    plan = plan_memory(
        PlanRequest(
            model=write_model(tmp_path, 32, 32, 32, 4096),
            duo={"pattern": "Llama-2-7B-32K-Instruct", "sparsity": 0.75},
            kv_cache_bytes=40 * GIB,
            max_model_len=TOKENS,
        )
    )
    assert plan.bytes_per_token == 256 * 512
    assert plan.constant_bytes_per_request == 768 * 320 * 512
    assert (plan.block_bytes, plan.num_blocks) == (16 * 2**20, 2560)
    assert plan.concurrent_requests == 2559 / (256 + 8)
    assert plan.full.concurrent_requests == 639 / 256


def test_qwen3_8b_in_blocks_of_16(tmp_path):
    """36 layers x 8 heads: 288, half of them stream; the head size is a key of its own.

    A block of 16 tokens of 144 heads is 1.125 MiB: 36,408 in 40 GiB. 320 tokens of 144 heads are 20
    blocks, 32,768 are 2,048.
    """
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128}
    plan = plan_memory(
        PlanRequest(
            model=write_model(tmp_path / "model", 36, 32, 8, 4096, **config),
            duo={"pattern": checkered(tmp_path / "pattern", 36, 8)},
            kv_cache_bytes=40 * GIB,
            max_model_len=TOKENS,
            block_size=16,
        )
    )
    assert plan.bytes_per_token == 144 * 512
    assert plan.constant_bytes_per_request == 144 * 320 * 512
    assert plan.num_blocks == 40 * GIB // (144 * 16 * 512) == 36_408
    assert plan.concurrent_requests == 36_407 / 2_068
    assert plan.full.concurrent_requests == (40 * GIB // (288 * 16 * 512) - 1) / 2048


def test_mistral_7b(tmp_path):
    """32 layers x 8 heads, 64 of 256 stream at 25 %; no sliding window in v0.2.

    A block of 128 tokens of 192 heads is 12 MiB and takes all 320 tokens of the 64 streaming heads
    (10 MiB): one block a request. 40 GiB are 3,413 blocks.
    """
    config = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    plan = plan_memory(
        PlanRequest(
            model=write_model(tmp_path, 32, 32, 8, 4096, sliding_window=None, **config),
            duo={"pattern": "Mistral-7B-Instruct-v0.2", "sparsity": 0.25},
            kv_cache_bytes=40 * GIB,
            max_model_len=TOKENS,
        )
    )
    assert plan.bytes_per_token == 192 * 512
    assert plan.constant_bytes_per_request == 64 * 320 * 512
    assert (plan.num_blocks, plan.streaming_blocks_per_request) == (3413, 1)
    assert plan.concurrent_requests == 3412 / 257


def test_llama_31_70b_on_eight_ranks(tmp_path):
    """80 layers x 8 heads of size 8,192 / 64 = 128; each rank has one head a layer, 40 of 80 stream.

    A rank's block of 128 tokens of 40 heads is 2.5 MiB: 8,192 of them in 20 GiB a rank.
    """
    plan = plan_memory(
        PlanRequest(
            model=write_model(tmp_path / "model", 80, 64, 8, 8192),
            duo={"pattern": checkered(tmp_path / "pattern", 80, 8)},
            kv_cache_bytes=20 * GIB,
            max_model_len=TOKENS,
            tensor_parallel_size=8,
        )
    )
    assert plan.bytes_per_token == 40 * 512
    assert plan.constant_bytes_per_request == 40 * 320 * 512
    assert (plan.block_bytes, plan.num_blocks) == (40 * 128 * 512, 8192)
    assert plan.concurrent_requests == 8191 / 259
    assert plan.full.bytes_per_token == 80 * 512
    assert plan.full.concurrent_requests == 4095 / 256
    assert plan.tensor_parallel_loss == 0
    assert plan.notes == [
        "tensor parallelism 8: 40 retrieval heads a rank; requests of 32768 tokens: 1.98 x stock on "
        "each rank, 1.98 x on a single one, 0.0 % lost"
    ]


def test_a_stage_keeps_its_own_layers(tmp_path, monkeypatch):
    """32 layers x 8 heads, half of them streaming; a block of 128 tokens of 64 heads is 4 MiB."""
    settings = {
        "model": write_model(tmp_path / "model", 32, 32, 8, 4096),
        "duo": {"pattern": checkered(tmp_path / "pattern", 32, 8)},
        "kv_cache_bytes": 20 * GIB,
        "max_model_len": TOKENS,
        "pipeline_parallel_size": 2,
    }
    plan = plan_memory(PlanRequest(**settings))
    assert plan.bytes_per_token == 64 * 512
    assert (plan.block_bytes, plan.num_blocks) == (64 * 128 * 512, 5120)
    assert plan.full.bytes_per_token == 128 * 512
    assert plan.notes == [
        "pipeline parallelism 2: 64 retrieval heads a rank; requests of 32768 tokens: 1.98 x stock on "
        "each rank, 1.98 x on a single one, 0.0 % lost"
    ]
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "24,8")
    assert plan_memory(PlanRequest(**settings)).bytes_per_token == 96 * 512
    both = plan_memory(PlanRequest(**settings, tensor_parallel_size=4))
    assert both.bytes_per_token == 24 * 512


@pytest.mark.parametrize(
    ("dtype", "kv_cache_dtype", "row"),
    [
        ("auto", "auto", 512),
        ("float32", "auto", 1024),
        ("half", "auto", 512),
        ("bfloat16", "fp8", 256),
        ("bfloat16", "int8_per_token_head", 264),
        ("float32", "int4_per_token_head", 136),
    ],
)
def test_bytes_of_a_token_in_one_head(tmp_path, dtype, kv_cache_dtype, row):
    plan = plan_memory(
        PlanRequest(
            model=write_model(tmp_path, 32, 32, 8, 4096),
            duo={"pattern": "Meta-Llama-3.1-8B-Instruct"},
            kv_cache_bytes=GIB,
            max_model_len=TOKENS,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
        )
    )
    assert plan.bytes_per_token == 128 * row
    assert plan.full.bytes_per_token == 256 * row
    assert not [note for note in plan.notes if "refuses" in note]


def test_four_bits_and_half_of_the_heads_hold_seven_times_the_tokens(tmp_path):
    """Llama-3.1-8B at 32,768 tokens: a block of 128 tokens of 128 heads is 128 * 136 bytes a head.

    In 40 GiB 19,275 blocks, against 2,560 of stock's with 256 heads of 512 bytes in bfloat16.
    """
    plan = plan_memory(
        PlanRequest(
            model=write_model(tmp_path, 32, 32, 8, 4096),
            duo={"pattern": "Meta-Llama-3.1-8B-Instruct"},
            kv_cache_bytes=40 * GIB,
            max_model_len=TOKENS,
            kv_cache_dtype="int4_per_token_head",
        )
    )
    assert (plan.block_bytes, plan.num_blocks) == (128 * 128 * 136, 19_275)
    assert plan.times_unquantised_full_attention == (19_274 / 259) / (2_559 / 256)
    assert plan.times_unquantised_full_attention > 7
    assert plan.times_full_attention == pytest.approx(256 / 259 * 2, rel=1e-3)


def test_streaming_heads_in_bfloat16_beside_four_bits(tmp_path):
    """The same in 40 GiB: 34 tokens of 128 streaming heads of 512 bytes fill a block, 320 are 10."""
    plan = plan_memory(
        PlanRequest(
            model=write_model(tmp_path, 32, 32, 8, 4096),
            duo={
                "pattern": "Meta-Llama-3.1-8B-Instruct",
                "streaming_cache_dtype": "model",
            },
            kv_cache_bytes=40 * GIB,
            max_model_len=TOKENS,
            kv_cache_dtype="int4_per_token_head",
        )
    )
    assert (plan.block_bytes, plan.num_blocks) == (128 * 128 * 136, 19_275)
    assert (plan.streaming_block_size, plan.streaming_blocks_per_request) == (34, 10)
    assert plan.constant_bytes_per_request == 128 * 320 * 512
    assert plan.bytes_per_token == 128 * 136
    assert plan.times_unquantised_full_attention == (19_274 / 266) / (2_559 / 256)
    # Full attention keeps four bits in every head.
    assert plan.full.bytes_per_token == 256 * 136
    assert plan.settings.streaming_cache_dtype == "model"


def test_layers_that_are_skipped(tmp_path):
    """Llama-3.1-8B's shape, of each layer's 8 heads 4 stream, the first and the last layer in bf16.

    A token of a head has 264 bytes in int8 and 512 in bf16, in 30 layers of 4 heads and 2 of 4. A block
    is 128 such tokens of the retrieval heads; 320 of the streaming heads, as many bytes each, are 3.
    """
    settings = {
        "model": write_model(tmp_path / "model", 32, 32, 8, 4096),
        "duo": {"pattern": checkered(tmp_path / "pattern", 32, 8)},
        "kv_cache_bytes": 40 * GIB,
        "max_model_len": TOKENS,
        "kv_cache_dtype": "int8_per_token_head",
    }
    plan = plan_memory(PlanRequest(**settings, skip_layers=("0", "31")))
    token = 30 * 4 * 264 + 2 * 4 * 512
    assert plan.bytes_per_token == token
    assert plan.constant_bytes_per_request == 320 * token
    assert (plan.block_bytes, plan.num_blocks) == (128 * token, 40 * GIB // (128 * token))
    assert plan.concurrent_requests == (plan.num_blocks - 1) / 259
    # Full attention leaves out the same layers.
    assert plan.full.bytes_per_token == 2 * token
    assert plan.settings.skipped_layers == [0, 31]
    with pytest.raises(
        ValueError, match="expected layers from 0 to 31 or sliding_window, got '32'"
    ):
        plan_memory(PlanRequest(**settings, skip_layers=("32",)))


class TestCacheOfTheCheckpoint:
    """A KV cache in fp8, by its config.json: 256 bytes a token in a head of 128."""

    @pytest.fixture
    def plan(self, tmp_path):
        def plan(quantisation=None, file=None, **flags):
            settings = {} if quantisation is None else {"quantization_config": quantisation}
            model = write_model(tmp_path / "model", 32, 32, 8, 4096, **settings)
            if file is not None:
                (tmp_path / "model" / "hf_quant_config.json").write_text(json.dumps(file))
            duo = {"pattern": checkered(tmp_path / "pattern", 32, 8)}
            pool = {"kv_cache_bytes": 4 * GIB, "max_model_len": TOKENS}
            return plan_memory(PlanRequest(model=model, duo=duo, **pool, **flags))

        return plan

    def test_of_compressed_tensors(self, plan):
        found = plan(cache_scheme()["quantization_config"])
        assert found.bytes_per_token == 128 * 256
        assert found.settings.kv_cache_dtype == "fp8"
        assert found.notes == [
            "the checkpoint asks for a KV cache in fp8, which --kv-cache-dtype auto gives it"
        ]

    def test_the_flag_comes_first(self, plan):
        found = plan(cache_scheme()["quantization_config"], kv_cache_dtype="bfloat16")
        assert found.bytes_per_token == 128 * 512

    @pytest.mark.parametrize("beside", [True, False])
    def test_of_modelopt(self, plan, beside):
        keys = {"producer": {"name": "modelopt"}}
        keys["quantization"] = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
        found = plan(**{"file" if beside else "quantisation": keys})
        assert found.bytes_per_token == 128 * 256
        assert found.settings.kv_cache_dtype == "fp8_e4m3"

    def test_scales_of_each_head_are_refused(self, plan):
        with pytest.raises(NotImplementedError, match="each head's own"):
            plan(cache_scheme(strategy="attn_head")["quantization_config"])

    def test_a_format_that_is_not_served_is_refused(self, plan):
        with pytest.raises(NotImplementedError, match="--kv-cache-dtype nvfp4: use one of auto"):
            plan({"quant_method": "modelopt", "kv_cache_quant_algo": "NVFP4"})

    def test_drafts_of_a_model_are_refused_with_it(self, plan, tmp_path):
        drafts = {"draft_model": write_model(tmp_path / "draft", 2, 4, 2, 512)}
        with pytest.raises(NotImplementedError, match="asks for a KV cache in fp8; use ngram"):
            plan(cache_scheme()["quantization_config"], num_speculative_tokens=2, **drafts)


def test_all_heads_streaming_fits_any_length(tmp_path):
    plan = plan_memory(
        PlanRequest(
            model=write_model(tmp_path, 32, 32, 8, 4096),
            duo={"pattern": "Meta-Llama-3.1-8B-Instruct", "sparsity": 1},
            kv_cache_bytes=GIB,
        )
    )
    assert plan.longest_request_tokens is None
    assert plan.bytes_per_token == 0


def test_pool_of_no_block_has_no_factor(tmp_path):
    plan = plan_memory(
        PlanRequest(
            model=write_model(tmp_path, 32, 32, 8, 4096),
            duo={"pattern": "Meta-Llama-3.1-8B-Instruct"},
            kv_cache_bytes=2**20,
        )
    )
    assert (plan.concurrent_requests, plan.times_full_attention) == (0, None)


def test_documented_fields_are_the_real_ones():
    documented = {line.split("`")[1] for line in PLAN_MD.read_text().splitlines() if "| `" in line}
    models = (LengthPlan, MemoryPlan, Plan, PlanSettings)
    assert documented == {name for model in models for name in model.model_fields}
