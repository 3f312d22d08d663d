"""What a server with bad or good settings answers, before any weights load.

The models are config.json files; vLLM's own EngineArgs makes the whole config from them.
"""

from __future__ import annotations

import json
import logging
import re
from types import SimpleNamespace
from typing import get_args

import pytest
import vllm.config.vllm
import vllm.platforms
from vllm.config.speculative import SpeculativeMethod
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.this_process import this_process  # noqa: F401 - a fixture
from vllm_duo import support
from vllm_duo.drafts import Drafts
from vllm_duo.heads import HeadPattern
from vllm_duo.model_facts import ModelFacts, model_refusals
from vllm_duo.server_plan import resolve_plan
from vllm_duo.windows import layer_windows

PATTERN = "0.0\t1.0\n1.0\t0.25\n"  # 2 layers, 2 KV heads
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
}


def config_json(architecture: str, model_type: str, **settings) -> dict:
    return {"architectures": [architecture], "model_type": model_type, **SIZES, **settings}


LLAMA = config_json("LlamaForCausalLM", "llama")
MISTRAL = config_json("MistralForCausalLM", "mistral", sliding_window=32)
GEMMA_2 = config_json("Gemma2ForCausalLM", "gemma2", head_dim=16, sliding_window=32)
GEMMA_3 = config_json(
    "Gemma3ForCausalLM", "gemma3_text", head_dim=16, sliding_window=32, sliding_window_pattern=2
)
GEMMA_3N = config_json("Gemma3nForCausalLM", "gemma3n_text", head_dim=16, sliding_window=32)
FULL = {"layer_types": ["full_attention", "full_attention"]}
LLAMA_4 = config_json("Llama4ForCausalLM", "llama4_text", head_dim=16, num_local_experts=2)
CHUNKED = {"attention_chunk_size": 64, "layer_types": ["chunked_attention", "full_attention"]}
BLOOM = config_json("BloomForCausalLM", "bloom", n_layer=2, n_head=4, seq_length=256)
FALCON = config_json("FalconForCausalLM", "falcon", alibi=True)
GPT_OSS = config_json("GptOssForCausalLM", "gpt_oss", head_dim=16, num_local_experts=2)
WINDOWED = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
JAMBA = config_json("JambaForCausalLM", "jamba", attn_layer_period=2, attn_layer_offset=1)
DEEPSEEK = config_json("DeepseekV2ForCausalLM", "deepseek_v2", n_routed_experts=2, q_lora_rank=None)
MLA = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
WHISPER = config_json("WhisperForConditionalGeneration", "whisper", d_model=64)
ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 4, "max_source_positions": 64}
DECODER = {"decoder_layers": 2, "decoder_attention_heads": 4, "max_target_positions": 256}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}

HEAD_SIZES = "supported are 16, 32, 64, 80, 96, 112, 128, 160, 192, 224, 256"
REFUSED_MODELS = {
    "soft-capped logits": (GEMMA_2, "soft-capped attention logits"),
    "chunked local attention": (LLAMA_4 | CHUNKED, "chunked local attention (64 tokens)"),
    "ALiBi by model": (BLOOM, "ALiBi position biases"),
    "ALiBi by setting": (FALCON, "ALiBi position biases"),
    "learned attention sinks": (
        GPT_OSS | WINDOWED,
        "learned attention sinks (these are logits, not sink tokens)",
    ),
    "multi-head latent attention (MLA)": (
        DEEPSEEK | MLA,
        "multi-head latent attention (MLA): its cache has no KV heads to split",
        f"the head size 48: {HEAD_SIZES}",
    ),
    "encoder-decoder models": (
        WHISPER | ENCODER | DECODER | TOKENS,
        "cross-attention (an encoder-decoder model)",
        "multimodal input: not tested yet",
    ),
    "Mamba and linear-attention layers": (
        JAMBA,
        "layers without attention (Mamba, linear attention and their like)",
    ),
    "layers that share a KV cache": (
        GEMMA_3N | FULL | {"num_kv_shared_layers": 1},
        "layers that share another layer's KV cache",
    ),
    "embeddings and pooling": (
        config_json("BertModel", "bert"),
        "the task 'pooling': only text generation keeps a KV cache",
    ),
    "quantised KV cache, by the checkpoint": (
        LLAMA
        | {
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": "dense",
                "config_groups": {},
                "kv_cache_scheme": {"num_bits": 8, "type": "float"},
            }
        },
        "the checkpoint's own KV cache quantisation ({'num_bits': 8, 'type': 'float'})",
    ),
    "other head sizes": (LLAMA | {"head_dim": 24}, f"the head size 24: {HEAD_SIZES}"),
}
# What docs/compatibility.md calls these models, where it is not by the key above.
ROWS = {
    "ALiBi by model": ("ALiBi",),
    "ALiBi by setting": ("ALiBi",),
    "encoder-decoder models": ("encoder-decoder models", "multimodal input"),
}
METHODS = set(get_args(SpeculativeMethod))
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
CONNECTOR = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
PER_KIND = {"backend": "duo", "backend_per_kind": {"sliding_window": "CPU_ATTN"}}
REFUSED_SETTINGS = {
    "Ray executor on CPUs": (
        "--distributed-executor-backend ray: vLLM does not run Ray on the platform cpu, use mp",
        {"tensor_parallel_size": 2, "distributed_executor_backend": "ray"},
    ),
    "several nodes": (
        "--nnodes 2: not tested yet, set it to 1",
        {"tensor_parallel_size": 2, "nnodes": 2},
    ),
    "pipeline parallelism": (
        "--pipeline-parallel-size 2: vLLM's model runner for CPUs fails with it whatever the attention "
        "backend, set it to 1",
        {"pipeline_parallel_size": 2},
    ),
    "decode-context parallelism": (
        "--decode-context-parallel-size 2: not tested yet, set it to 1",
        {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
    ),
    "prefill-context parallelism": (
        "--prefill-context-parallel-size 2: not tested yet, set it to 1",
        {"prefill_context_parallel_size": 2},
    ),
    "quantised KV cache, other formats": (
        "--kv-cache-dtype nvfp4: use one of auto, float16, bfloat16, fp8, fp8_e4m3, fp8_e5m2, "
        "fp8_per_token_head, int8_per_token_head, int4_per_token_head",
        {"kv_cache_dtype": "nvfp4"},
    ),
    "quantised KV cache, some layers": (
        "--kv-cache-dtype-skip-layers: all layers' caches are of one type",
        {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
    ),
    "KV cache in another float type than the model": (
        "--kv-cache-dtype bfloat16 for a model in float32: use auto",
        {"kv_cache_dtype": "bfloat16"},
    ),
    "hybrid KV cache manager switched off": (
        "--disable-hybrid-kv-cache-manager: two kinds of cache need the hybrid manager",
        {"disable_hybrid_kv_cache_manager": True},
    ),
    "KV connectors": (
        "KV connectors (--kv-transfer-config): they do not see the streaming caches",
        {"kv_transfer_config": CONNECTOR},
    ),
    "KV-sharing fast prefill": ("--kv-sharing-fast-prefill", {"kv_sharing_fast_prefill": True}),
    "KV offloading": (
        "--kv-offloading-size: the offloading connector does not see the streaming caches",
        {"kv_offloading_size": 1.0},
    ),
    "attention that is not causal": (
        "attention that is not causal",
        {"attention_backend": None, "attention_config": {"backend": "duo", "use_non_causal": True}},
    ),
    "microbatches (`--ubatch-size`)": (
        "microbatches (--enable-dbo, --ubatch-size): their threads would share one workspace",
        {"ubatch_size": 2, "all2all_backend": "deepep_low_latency"},
    ),
    "attention backends per kind of layer": (
        "attention backends per kind of layer: all attention layers must run duo",
        {"attention_backend": None, "attention_config": PER_KIND},
    ),
}
BAD_TABLES = {
    "too many layers": (PATTERN + "1.0\t1.0\n", "head pattern has 3 layers, the model has 2"),
    "too few heads": ("1.0\n0.0\n", "has 1 KV heads per layer, the model has 2"),
    "not a number at all": ("0.0\t1.0\n1.0\thalf\n", "line 2, column 2: expected a number"),
    "NaN": ("0.0\tnan\n1.0\t0.0\n", r"line 1, column 2: expected a value in .*, got nan"),
    "too high": ("0.0\t1.0\n1.02\t0.0\n", r"line 2, column 1: .*\[-0.01, 1.01\], got 1.02"),
    "too low": ("0.0\t1.0\n1.0\t-0.02\n", r"line 2, column 2: .*\[-0.01, 1.01\], got -0.02"),
    "ragged": ("0.0\t1.0\n1.0\n", "line 2: expected 2 values as in line 1, found 1"),
    "empty": ("", "expected one line per layer, found an empty file"),
}
BAD_SETTINGS = [
    ({"sparsty": 0.5}, r"sparsty: unknown key \(did you mean sparsity\?\), got 0.5: allowed keys"),
    ({"sparsity": 0.5, "threshold": 0.5}, "expected at most one of them, got sparsity=0.5 and"),
    ({"sparsity": 1.5}, "sparsity: expected a number from 0 to 1, got 1.5"),
    ({"sparsity": float("nan")}, "sparsity: expected a number from 0 to 1, got nan"),
    ({"sink_size": -1}, "sink_size: expected a whole number of tokens from 0 to .*, got -1"),
    ({"recent_size": 0}, "recent_size: expected a whole number of tokens from 1 to .*, got 0"),
    ({"recent_size": "256"}, "recent_size: expected a whole number of tokens .*, got '256'"),
    ({"recent_size": 0, "top": 1}, "(?s)recent_size: expected.*top: unknown key"),
    ({"pattern": "no-such-thing"}, "expected a folder or the name of a shipped pattern"),
    (0.5, "expected an object, got 0.5"),
]


def refused(cases):
    """Parameters of which each shows its rows of docs/compatibility.md."""
    return [
        pytest.param(case, id=name, marks=pytest.mark.refused(*ROWS.get(name, (name,))))
        for name, case in cases.items()
    ]


@pytest.fixture
def serve(tmp_path):
    """Makes vLLM's config of a model folder, as the front end of a server does."""

    def serve(config=LLAMA, table: str | None = PATTERN, duo=None, **settings):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if table is not None:
            (tmp_path / "duo_pattern").mkdir()
            (tmp_path / "duo_pattern" / "full_attention_heads.tsv").write_text(table)
        defaults = {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "attention_backend": "duo",
            "additional_config": {} if duo is None else {"duo": duo},
        }
        return EngineArgs(model=str(tmp_path), **(defaults | settings)).create_engine_config()

    return serve


@pytest.fixture
def messages():
    """(level, text) of what the plugin logs; vLLM's loggers do not propagate."""
    logger = logging.getLogger("vllm.vllm_duo.compat.cpu_platform")
    level, records, handler = logger.level, [], logging.Handler()
    handler.emit = lambda record: records.append((record.levelname, record.getMessage()))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def drafting(method, async_scheduling=False):
    """What of a server's config says how it drafts."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(method=method),
        scheduler_config=SimpleNamespace(async_scheduling=async_scheduling),
    )


def facts_with(windows) -> ModelFacts:
    return ModelFacts(name="model", num_layers=2, num_kv_heads=2, head_size=16, windows=windows)


def reasons_of(serve, *args, **settings) -> list[str]:
    with pytest.raises(NotImplementedError, match="does not support this server") as caught:
        serve(*args, **settings)
    return re.findall(r"^  - (.*)$", str(caught.value), flags=re.MULTILINE)


class TestRefusals:
    @pytest.mark.parametrize("model", refused(REFUSED_MODELS))
    def test_model(self, serve, model):
        config, *reasons = model
        assert reasons_of(serve, config) == reasons

    @pytest.mark.parametrize("setting", refused(REFUSED_SETTINGS))
    def test_setting(self, serve, setting):
        reason, settings = setting
        assert reasons_of(serve, **settings) == [reason]

    @pytest.mark.refused("KV heads that the ranks do not divide")
    def test_heads_that_cannot_be_split(self, serve):
        shape = {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 6}
        (reason,) = reasons_of(serve, LLAMA | shape, tensor_parallel_size=4)
        assert reason.startswith(
            "--tensor-parallel-size 4: 6 KV heads cannot be split over 4 ranks: expected that one "
        )

    @pytest.mark.refused("model runner V2")
    def test_model_runner_v2(self, serve, monkeypatch):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        (reason,) = reasons_of(serve)
        assert reason.endswith("not tested yet, set VLLM_USE_V2_MODEL_RUNNER=0")

    @pytest.mark.refused("speculative decoding, EAGLE, MTP, Medusa and the like")
    def test_drafts_of_an_eagle_head(self, serve, tmp_path):
        drafts = {"method": "eagle", "model": str(tmp_path), "num_speculative_tokens": 2}
        (reason,) = reasons_of(serve, speculative_config=drafts)
        assert reason.startswith("speculative decoding by 'eagle': ")
        assert reason.endswith(
            "use one of ngram, custom_class, draft_model or remove --speculative-config"
        )

    @pytest.mark.parametrize("method", sorted(METHODS - {"ngram", "custom_class", "draft_model"}))
    def test_every_other_way_to_draft(self, method):
        (reason,) = support._speculation(drafting(method))
        assert reason.startswith(f"speculative decoding by {method!r}: ")

    @pytest.mark.parametrize(
        ("config", "drafts", "reason"),
        [
            (LLAMA, {"parallel_drafting": True}, "drafting in parallel is not tested"),
            (LLAMA, {"attention_backend": "CPU_ATTN"}, "the attention backend CPU_ATTN: all"),
            (LLAMA, {"kv_cache_dtype": "fp8"}, "the KV cache fp8: it has the model's own"),
            (LLAMA | {"head_dim": 24}, {}, "the head size 24: supported are"),
            (MISTRAL, {}, "the model's own sliding window (2 of 2 layers slide over 32 tokens): a"),
        ],
    )
    def test_draft_model(self, serve, tmp_path, config, drafts, reason):
        folder = tmp_path / "draft"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"pard_token": 1}))
        given = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}
        (found,) = reasons_of(serve, speculative_config=given | drafts)
        assert found.startswith(f"the draft model: {reason}")

    @pytest.mark.refused("draft model with tensor parallelism")
    def test_draft_model_over_several_ranks(self, serve, tmp_path):
        folder = tmp_path / "draft"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(LLAMA))
        drafts = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}
        (reason,) = reasons_of(serve, speculative_config=drafts, tensor_parallel_size=2)
        assert reason == (
            "the draft model: --tensor-parallel-size 2 is not tested with one; use ngram or set it "
            "to 1"
        )

    def test_draft_model_with_a_quantised_cache(self, serve, tmp_path):
        folder = tmp_path / "draft"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(LLAMA))
        drafts = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}
        (reason,) = reasons_of(serve, speculative_config=drafts, kv_cache_dtype="fp8")
        assert reason == (
            "the draft model: --kv-cache-dtype fp8 is not tested with one; use ngram or auto"
        )

    def test_drafts_with_steps_planned_ahead(self):
        (reason,) = support._speculation(drafting("ngram", async_scheduling=True))
        assert reason.endswith("use --no-async-scheduling")

    def test_drafts_on_a_gpu(self, platform):
        platform("cuda")
        (reason,) = support._speculation(drafting("ngram"))
        assert reason.startswith("speculative decoding on a GPU: not tested yet")

    def test_every_reason_is_told_at_once(self, serve):
        reasons = reasons_of(serve, FALCON, pipeline_parallel_size=2, kv_cache_dtype="nvfp4")
        assert [reason.split(":")[0] for reason in reasons] == [
            "ALiBi position biases",
            "--pipeline-parallel-size 2",
            "--kv-cache-dtype nvfp4",
        ]

    def test_they_come_before_a_missing_pattern(self, serve):
        assert reasons_of(serve, FALCON, table=None) == ["ALiBi position biases"]

    @pytest.mark.refused("sliding windows of several sizes")
    @pytest.mark.parametrize("window", [[32, 64], [32]])
    def test_windows_of_several_sizes(self, window):
        (reason,) = model_refusals(facts_with(layer_windows(2, window, None)))
        assert reason == (
            "the model's own sliding windows: their sizes are not known for every layer"
        )

    # This vLLM knows one platform only, so other ones are stand-ins.
    @pytest.fixture
    def platform(self, monkeypatch):
        def choose(name):
            platform = SimpleNamespace(
                device_name=name, is_cpu=lambda: False, is_cuda=lambda: name == "cuda"
            )
            monkeypatch.setattr(vllm.platforms, "current_platform", platform, raising=False)

        return choose

    @pytest.fixture
    def executor_reasons(self, monkeypatch):
        """What is refused of vLLM's parallel settings, on a platform that runs Ray."""

        def reasons(ray_device_key="GPU", **settings):
            platform = SimpleNamespace(device_name="stand-in", ray_device_key=ray_device_key)
            monkeypatch.setattr(vllm.platforms, "current_platform", platform, raising=False)
            defaults = {"distributed_executor_backend": "mp", "data_parallel_backend": "mp"}
            sizes = {"data_parallel_size": 1, "world_size": 2}
            parallel = SimpleNamespace(**(defaults | sizes | settings))
            return list(support.executor_refusals(parallel))

        return reasons

    def test_ray_where_vllm_runs_it(self, executor_reasons):
        assert executor_reasons(distributed_executor_backend="ray") == []

    def test_ray_where_vllm_does_not(self, executor_reasons):
        (reason,) = executor_reasons("", distributed_executor_backend="ray", world_size=1)
        assert reason.endswith("vLLM does not run Ray on the platform stand-in, use mp")

    @pytest.mark.refused("Ray executor and data parallelism together")
    def test_ray_and_replicas(self, executor_reasons):
        (reason,) = executor_reasons(distributed_executor_backend="ray", data_parallel_size=2)
        assert "ray with --data-parallel-size 2: not tested yet" in reason

    @pytest.mark.refused("data parallelism over Ray")
    def test_replicas_over_ray(self, executor_reasons):
        (reason,) = executor_reasons(data_parallel_backend="ray", data_parallel_size=2)
        assert reason == "--data-parallel-backend ray: not tested yet, use mp"

    def test_other_executors(self, executor_reasons):
        (reason,) = executor_reasons(distributed_executor_backend="external_launcher")
        assert reason == "--distributed-executor-backend external_launcher: not tested yet, use mp"

    @pytest.mark.parametrize("is_cpu", [True, False])
    def test_pipelines_are_refused_on_cpus_alone(self, monkeypatch, is_cpu):
        platform = SimpleNamespace(is_cpu=lambda: is_cpu)
        monkeypatch.setattr(vllm.platforms, "current_platform", platform, raising=False)
        assert bool(support.pipeline_refusal(2)) is is_cpu
        assert support.pipeline_refusal(1) is None

    @pytest.mark.refused("other platforms")
    def test_other_platform(self, platform):
        platform("rocm")
        (reason,) = support.platform_refusals({"duo": {"untested_gpu": True}})
        assert reason == "the platform rocm: vllm-duo has kernels for CPUs and for NVIDIA GPUs"

    @pytest.mark.refused("NVIDIA GPUs")
    @pytest.mark.parametrize("settings", [None, {}, {"duo": {"untested_gpu": False}}])
    def test_gpu_is_untested(self, platform, settings):
        platform("cuda")
        (reason,) = support.platform_refusals(settings)
        assert "never on a GPU" in reason
        assert '"untested_gpu": true' in reason

    def test_gpu_may_be_tried(self, platform):
        platform("cuda")
        assert list(support.platform_refusals({"duo": {"untested_gpu": True}})) == []

    def test_kernel_of_a_gpu_on_a_cpu(self, serve):
        (reason,) = reasons_of(serve, duo={"retrieval_prefill": "flash-attn"})
        assert reason.startswith("\"retrieval_prefill\": 'flash-attn': it chooses a GPU's kernel")


class TestModelRunner:
    """vLLM's own choice, as where Triton has a device to run on."""

    @pytest.fixture(autouse=True)
    def told(self, monkeypatch):
        """What vLLM logs of its choice, once."""
        monkeypatch.setattr(vllm.config.vllm, "HAS_TRITON", True)
        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
        found: list[str] = []

        def warning_once(message, *values):
            if (text := message % values) not in found:
                found.append(text)

        monkeypatch.setattr(vllm.config.vllm.logger, "warning_once", warning_once)
        return found

    def test_is_v1_without_a_setting_and_vllm_says_why(self, serve, told):
        assert serve().use_v2_model_runner is False
        assert [line for line in told if "Runner" in line] == [
            "Model Runner V2 does not yet support the attention backend duo; using the V1 model runner "
            "instead."
        ]

    def test_is_still_refused_where_v2_is_asked_for(self, serve, told, monkeypatch):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        (reason,) = reasons_of(serve)
        assert reason == ("vLLM's model runner V2: not tested yet, set VLLM_USE_V2_MODEL_RUNNER=0")

    def test_v2_may_be_tried(self, serve, told, monkeypatch):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        config = serve(duo={"untested_model_runner": True})
        assert config.use_v2_model_runner is True

    def test_trying_v2_takes_the_variable_too(self, serve, told):
        assert serve(duo={"untested_model_runner": True}).use_v2_model_runner is False

    def test_is_v1_where_v1_is_asked_for(self, serve, told, monkeypatch):
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        assert serve().use_v2_model_runner is False
        assert [line for line in told if "Runner" in line] == []

    def test_of_other_backends_is_vllms(self, serve, told):
        assert serve(table=None, attention_backend=None).use_v2_model_runner is True
        assert [line for line in told if "Runner" in line] == []


class TestPatterns:
    @pytest.mark.parametrize(("table", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
    def test_bad_table(self, serve, tmp_path, table, message):
        with pytest.raises(ValueError, match=message) as caught:
            serve(table=table)
        assert str(tmp_path / "duo_pattern") in str(caught.value)

    def test_none_found(self, serve, tmp_path):
        with pytest.raises(ValueError, match="no head pattern for model") as caught:
            serve(table=None)
        assert "make one with `vllm-duo identify MODEL" in str(caught.value)

    @pytest.mark.parametrize(("duo", "message"), BAD_SETTINGS)
    def test_bad_setting(self, serve, duo, message):
        with pytest.raises(ValueError, match=message):
            serve(duo=duo)

    @pytest.mark.parametrize("backend", [None, "CPU_ATTN"])
    def test_settings_without_the_backend(self, serve, backend):
        with pytest.raises(ValueError, match=r'has a "duo" section.*add --attention-backend'):
            serve(duo={}, attention_backend=backend)


class TestGoodServers:
    def test_pattern_and_mask_are_logged(self, serve, messages):
        config = serve(duo={"sparsity": 0.25, "sink_size": 4}, enable_prefix_caching=False)
        assert config.attention_config.backend is AttentionBackendEnum.CUSTOM
        mask_hash = HeadPattern([[0.0, 1.0], [1.0, 0.25]]).select(sparsity=0.25).mask_hash
        assert messages[:1] == [
            (
                "INFO",
                "duo: pattern duo_pattern, sparsity 0.25 (setting): 1 of 4 KV heads stream "
                f"(25.0 %), mask {mask_hash}, sink 4 + recent 256 tokens",
            )
        ]

    @pytest.mark.parametrize("ranks", [2, 4])
    def test_heads_may_lie_on_several_ranks_or_be_copied(self, serve, ranks):
        assert serve(tensor_parallel_size=ranks).parallel_config.tensor_parallel_size == ranks

    def test_balanced_ranks_have_a_mask_of_their_own(self, serve, messages):
        """Of each rank's two heads one streams; without it those of rank 0 alone would."""
        table = "0.0\t1.0\n0.25\t1.0\n"
        serve(table=table, duo={"balance": True}, tensor_parallel_size=2)
        selection = HeadPattern([[0.0, 1.0], [0.25, 1.0]]).select(sparsity=0.5, balance_ranks=2)
        assert f"mask {selection.mask_hash}" in messages[0][1]
        assert selection.retrieval.sum(0).tolist() == [1, 1]

    @pytest.mark.parametrize("enabled", [True, False])
    def test_prefix_caching_stays_vllms_own_flag(self, serve, messages, enabled):
        config = serve(enable_prefix_caching=enabled)
        assert config.cache_config.enable_prefix_caching is enabled
        assert [text for level, text in messages if level == "WARNING"] == []

    def test_draft_models_layers_run_duo_too(self, serve, tmp_path):
        folder = tmp_path / "draft"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(LLAMA))
        drafts = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 3}
        config = serve(speculative_config=drafts)
        assert config.speculative_config.attention_backend is AttentionBackendEnum.CUSTOM
        # 2 layers of 2 KV heads of 16 elements.
        assert Drafts.of(config) == Drafts(size=3, token_bytes=2 * 2 * 2 * 16 * 4)

    def test_drafts_lengthen_the_ring(self, serve, messages):
        config = serve(duo={"sink_size": 4}, speculative_config=NGRAM)
        ((_, text), *_) = messages
        assert text.endswith("sink 4 + recent 256 tokens and 2 slots for drafts")
        assert Drafts.of(config) == Drafts(size=2)

    @pytest.mark.parametrize(
        "config",
        [
            MISTRAL | {"sliding_window": None},
            config_json("Qwen2ForCausalLM", "qwen2", sliding_window=32, use_sliding_window=False),
            config_json("Qwen3ForCausalLM", "qwen3", head_dim=16),
        ],
        ids=["mistral", "qwen2", "qwen3"],
    )
    def test_window_that_is_not_in_use_is_none(self, serve, config):
        assert serve(config).attention_config.backend is AttentionBackendEnum.CUSTOM

    def test_layers_that_slide_stream_and_the_settings_cut_the_others(self, serve, messages):
        """Of the second layer's two heads one streams; the pattern's first row is not read."""
        config = serve(GEMMA_3, duo={"sparsity": 0.5, "sink_size": 4}, enable_prefix_caching=False)
        plan = resolve_plan(config)
        assert plan.windows == (32, None)
        assert plan.resolved.selection.retrieval.tolist() == [[False, False], [True, False]]
        assert messages[0][1].endswith(
            "sink 4 + recent 256 tokens; 1 of 2 layers slide over 32 tokens of the model's own, with "
            "no sink"
        )

    def test_model_whose_layers_all_slide_needs_no_pattern(self, serve, messages):
        config = serve(MISTRAL, table=None)
        assert resolve_plan(config).windows == (32, 32)
        assert messages[0][1] == (
            "duo: 2 of 2 layers slide over 32 tokens of the model's own, so every head streams with "
            "no sink and no pattern is used"
        )

    def test_settings_that_have_no_heads_to_choose(self, serve):
        found = r"every layer of the model has a sliding window of its own \(32 tokens\).*"
        with pytest.raises(ValueError, match=f"{found}got sparsity=0.5, recent_size=16: remove"):
            serve(MISTRAL, duo={"sparsity": 0.5, "recent_size": 16})

    @pytest.mark.parametrize(("longest", "windows"), [(32, ()), (33, (32, 32))])
    def test_window_as_long_as_the_longest_request_hides_nothing(self, serve, longest, windows):
        assert resolve_plan(serve(MISTRAL, max_model_len=longest)).windows == windows

    def test_window_of_a_server_that_finds_its_longest_request(self, serve):
        """What it comes to is known only when the layers' caches have been described."""
        config = serve(MISTRAL, table=None, max_model_len=-1)
        config.model_config.max_model_len = 20
        assert resolve_plan(config).windows == (32, 32)

    def test_regular_snapshots_are_no_closer_than_the_window(self, serve):
        wide = MISTRAL | {"sliding_window": 2000, "max_position_embeddings": 4096}
        assert resolve_plan(serve(wide)).resolved.snapshot_interval == 2000

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_every_dtype(self, serve, dtype):
        config = serve(dtype=dtype, kv_cache_dtype="auto" if dtype == "float32" else dtype)
        assert str(config.model_config.dtype) == f"torch.{dtype}"

    @pytest.mark.switched_off("async scheduling")
    def test_async_scheduling_is_switched_off(self, serve):
        assert serve(async_scheduling=True).scheduler_config.async_scheduling is False

    @pytest.mark.switched_off("microbatches (`--enable-dbo`)")
    def test_dual_batch_overlap_is_switched_off(self, serve):
        config = serve(enable_dbo=True, all2all_backend="deepep_low_latency")
        assert not config.parallel_config.use_ubatching

    def test_adapters_on_a_cpu_come_with_a_warning(self, serve, messages):
        serve(enable_lora=True, max_loras=3)
        (warning,) = [text for level, text in messages if level == "WARNING"]
        assert "use the adapter in the last of the 3 slots" in warning
        assert "serve at most 2 adapters, or raise --max-loras" in warning

    def test_server_without_duo_is_left_alone(self, serve, messages):
        config = serve(table=None, attention_backend=None)
        assert config.cache_config.enable_prefix_caching is True
        assert messages == []
