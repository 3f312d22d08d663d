"""The plan's figures against sums done by hand: nothing here calls the layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vllm_duo.heads import HeadPattern
from vllm_duo.planning.plan import PlanRequest, plan_memory
from vllm_duo.planning.schema import LengthPlan, MemoryPlan, Plan, PlanSettings

GIB = 2**30
TOKENS = 32_768
PLAN_MD = Path(__file__).resolve().parents[2] / "docs" / "plan.md"


def write_model(
    folder: Path, layers: int, heads: int, kv_heads: int, hidden: int, **settings
) -> str:
    """A config.json as these models have it; head size 128 unless told."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": hidden,
        "max_position_embeddings": 131_072,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | settings))
    return str(folder)


def checkered(folder: Path, layers: int, kv_heads: int) -> str:
    """A pattern in which every other head is a retrieval head, shifted by one from layer to layer."""
    layer, head = np.indices((layers, kv_heads))
    HeadPattern(((layer + head) % 2).astype(float)).save(folder)
    return str(folder)


def by_length(plan: MemoryPlan, tokens: int) -> LengthPlan:
    (found,) = (length for length in plan.by_length if length.tokens == tokens)
    return found


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


class TestDrafts:
    def plan(self, tmp_path, **settings) -> Plan:
        return plan_memory(
            PlanRequest(
                model=write_model(tmp_path / "model", 32, 32, 8, 4096),
                duo={"pattern": "Meta-Llama-3.1-8B-Instruct"},
                kv_cache_bytes=40 * GIB,
                max_model_len=TOKENS,
                **settings,
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

    def test_a_draft_model_that_the_server_refuses(self, tmp_path):
        draft = write_model(
            tmp_path / "draft", 16, 32, 8, 2048, model_type="mistral", sliding_window=64
        )
        with pytest.raises(NotImplementedError, match="the draft model: the model's own sliding"):
            self.plan(tmp_path, num_speculative_tokens=4, draft_model=draft)

    def test_a_draft_model_over_several_ranks_is_what_the_server_refuses(self, tmp_path):
        draft = write_model(tmp_path / "draft", 16, 32, 8, 2048)
        settings = {"num_speculative_tokens": 4, "tensor_parallel_size": 2}
        with pytest.raises(NotImplementedError, match="the draft model: --tensor-parallel-size 2"):
            self.plan(tmp_path, draft_model=draft, **settings)
        assert self.plan(tmp_path, **settings).settings.num_speculative_tokens == 4


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
