"""What a server with good settings is configured to, and logs."""

from __future__ import annotations

import pytest
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.server.configs import (
    GEMMA_3,
    GPT_OSS,
    LLAMA,
    MISTRAL,
    cache_scheme,
    config_json,
    draft_model,
)
from vllm_duo.drafts import Drafts
from vllm_duo.heads import HeadPattern
from vllm_duo.server_plan import resolve_plan

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}


def test_pattern_and_mask_are_logged(serve, messages):
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


@pytest.mark.parametrize(
    ("cache", "kept", "logged"),
    [("int8_per_token_head", "model", 1), ("int8_per_token_head", "same", 0), ("auto", "model", 0)],
)
def test_what_streaming_heads_keep_is_logged(serve, messages, cache, kept, logged):
    config = serve(duo={"streaming_cache_dtype": kept}, kv_cache_dtype=cache)
    assert resolve_plan(config).resolved.streaming_cache_dtype == kept
    text = "duo: retrieval heads keep int8_per_token_head, streaming heads float32"
    assert sum(message.startswith(text) for _, message in messages) == logged


@pytest.mark.parametrize(
    ("flag", "kept", "logged"),
    [
        ("auto", "fp8", "and brings its scales"),
        ("fp8", "fp8", "and brings its scales"),
        ("int8_per_token_head", "int8_per_token_head", "not used with --kv-cache-dtype int8"),
    ],
)
def test_cache_that_the_checkpoint_asks_for(serve, messages, flag, kept, logged):
    """The scheduler's process would otherwise not know it: vLLM finds it out in the workers."""
    config = serve(LLAMA | cache_scheme(), kv_cache_dtype=flag)
    assert config.cache_config.cache_dtype == kept
    (text,) = [text for _, text in messages if "the checkpoint asks" in text]
    assert logged in text


def test_stock_vllms_config_is_left_alone(serve):
    config = serve(LLAMA | cache_scheme(), attention_backend=None, table=None)
    assert config.cache_config.cache_dtype == "auto"


@pytest.mark.parametrize(
    ("names", "layers"),
    [(["1"], {1}), (["sliding_window"], {0}), (["sliding_window", "1"], {0, 1})],
)
def test_layers_that_are_skipped(serve, messages, names, layers):
    config = serve(GEMMA_3, kv_cache_dtype="fp8", kv_cache_dtype_skip_layers=names)
    assert resolve_plan(config).skipped_layers == layers
    (text,) = [text for _, text in messages if "skip-layers" in text]
    assert text.startswith(f"duo: layers {', '.join(map(str, sorted(layers)))} keep float32 (")


def test_without_a_quantised_cache_nothing_is_skipped(serve, messages):
    serve(kv_cache_dtype_skip_layers=["1"])
    assert not [text for _, text in messages if "skip-layers" in text]


def test_windows_that_hide_nothing_are_skipped_all_the_same(serve):
    """As vLLM has it, which does not look at the longest request."""
    skip = {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["sliding_window"]}
    plan = resolve_plan(serve(GEMMA_3, max_model_len=32, **skip))
    assert (plan.windows, plan.skipped_layers) == ((), {0})


def test_no_such_layer_to_skip(serve):
    with pytest.raises(ValueError, match="expected layers from 0 to 1 or sliding_window, got '2'"):
        serve(kv_cache_dtype="fp8", kv_cache_dtype_skip_layers=["2"])


@pytest.mark.parametrize("ranks", [2, 4])
def test_heads_may_lie_on_several_ranks_or_be_copied(serve, ranks):
    assert serve(tensor_parallel_size=ranks).parallel_config.tensor_parallel_size == ranks


def test_balanced_ranks_have_a_mask_of_their_own(serve, messages):
    """Of each rank's two heads one streams; without it those of rank 0 alone would."""
    table = "0.0\t1.0\n0.25\t1.0\n"
    serve(table=table, duo={"balance": True}, tensor_parallel_size=2)
    selection = HeadPattern([[0.0, 1.0], [0.25, 1.0]]).select(sparsity=0.5, balance_ranks=2)
    assert f"mask {selection.mask_hash}" in messages[0][1]
    assert selection.retrieval.sum(0).tolist() == [1, 1]


@pytest.mark.parametrize("enabled", [True, False])
def test_prefix_caching_stays_vllms_own_flag(serve, messages, enabled):
    config = serve(enable_prefix_caching=enabled)
    assert config.cache_config.enable_prefix_caching is enabled
    assert [text for level, text in messages if level == "WARNING"] == []


@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3"])
def test_layers_that_draft_run_duo_too(serve, tmp_path, method):
    drafts = draft_model(tmp_path / "draft", size=3, method=method)
    config = serve(speculative_config=drafts)
    assert config.speculative_config.attention_backend is AttentionBackendEnum.CUSTOM
    drafts = Drafts.of(config)
    assert drafts == Drafts(size=3, num_layers=2, num_kv_heads=2, head_size=16, dtype_bytes=4)
    assert [drafts.token_bytes(ranks) for ranks in (1, 2, 4)] == [2 * 2 * 128, 2 * 128, 2 * 128]


def test_medusa_heads_keep_nothing(serve, tmp_path):
    heads = config_json("MedusaModel", "medusa", num_heads=2, num_hidden_layers=1)
    drafts = draft_model(tmp_path / "draft", heads, method="medusa")
    assert Drafts.of(serve(speculative_config=drafts)) == Drafts(size=2)


# A byte for each of 16 keys and values, and two scales; half of it.
@pytest.mark.parametrize(
    ("cache", "own", "head_bytes"),
    [
        ("int8_per_token_head", None, 40),
        ("int8_per_token_head", "int8_per_token_head", 40),
        ("int8_per_token_head", "int4_per_token_head", 24),
        ("int8_per_token_head", "auto", 128),
        ("auto", "fp8", 32),
    ],
)
def test_layers_that_draft_keep_their_own_numbers(serve, tmp_path, cache, own, head_bytes):
    """As in stock vLLM: those of ``--kv-cache-dtype``, if they are not given others."""
    drafts = draft_model(tmp_path / "draft", kv_cache_dtype=own)
    found = Drafts.of(serve(kv_cache_dtype=cache, speculative_config=drafts))
    assert found.head_bytes == head_bytes
    assert found.unquantised.head_bytes == 128


def test_drafts_lengthen_the_ring(serve, messages):
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
def test_window_that_is_not_in_use_is_none(serve, config):
    assert serve(config).attention_config.backend is AttentionBackendEnum.CUSTOM


def test_layers_that_slide_stream_and_the_settings_cut_the_others(serve, messages):
    """Of the second layer's two heads one streams; the pattern's first row is not read."""
    config = serve(GEMMA_3, duo={"sparsity": 0.5, "sink_size": 4}, enable_prefix_caching=False)
    plan = resolve_plan(config)
    assert plan.windows == (32, None)
    assert plan.resolved.selection.retrieval.tolist() == [[False, False], [True, False]]
    assert messages[0][1].endswith(
        "sink 4 + recent 256 tokens; 1 of 2 layers slide over 32 tokens of the model's own, with "
        "no sink"
    )


def test_learned_sinks_are_no_reason(serve):
    config = serve(GPT_OSS, duo={"sparsity": 0.5})
    assert config.attention_config.backend is AttentionBackendEnum.CUSTOM
    assert resolve_plan(config).windows == (32, None)


def test_model_whose_layers_all_slide_needs_no_pattern(serve, messages):
    config = serve(MISTRAL, table=None)
    assert resolve_plan(config).windows == (32, 32)
    assert messages[0][1] == (
        "duo: 2 of 2 layers slide over 32 tokens of the model's own, so every head streams with "
        "no sink and no pattern is used"
    )


def test_settings_that_have_no_heads_to_choose(serve):
    found = r"every layer of the model has a sliding window of its own \(32 tokens\).*"
    with pytest.raises(ValueError, match=f"{found}got sparsity=0.5, recent_size=16: remove"):
        serve(MISTRAL, duo={"sparsity": 0.5, "recent_size": 16})


@pytest.mark.parametrize(("longest", "windows"), [(32, ()), (33, (32, 32))])
def test_window_as_long_as_the_longest_request_hides_nothing(serve, longest, windows):
    assert resolve_plan(serve(MISTRAL, max_model_len=longest)).windows == windows


def test_window_of_a_server_that_finds_its_longest_request(serve):
    """What it comes to is known only when the layers' caches have been described."""
    config = serve(MISTRAL, table=None, max_model_len=-1)
    config.model_config.max_model_len = 20
    assert resolve_plan(config).windows == (32, 32)


def test_regular_snapshots_are_no_closer_than_the_window(serve):
    wide = MISTRAL | {"sliding_window": 2000, "max_position_embeddings": 4096}
    assert resolve_plan(serve(wide)).resolved.snapshot_interval == 2000


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype(serve, dtype):
    config = serve(dtype=dtype, kv_cache_dtype="auto" if dtype == "float32" else dtype)
    assert str(config.model_config.dtype) == f"torch.{dtype}"


@pytest.mark.switched_off("async scheduling")
def test_async_scheduling_is_switched_off(serve):
    assert serve(async_scheduling=True).scheduler_config.async_scheduling is False


@pytest.mark.switched_off("microbatches (`--enable-dbo`)")
def test_dual_batch_overlap_is_switched_off(serve):
    config = serve(enable_dbo=True, all2all_backend="deepep_low_latency")
    assert not config.parallel_config.use_ubatching


def test_adapters_on_a_cpu_come_with_a_warning(serve, messages):
    serve(enable_lora=True, max_loras=3)
    (warning,) = [text for level, text in messages if level == "WARNING"]
    assert "use the adapter in the last of the 3 slots" in warning
    assert "serve at most 2 adapters, or raise --max-loras" in warning


def test_server_without_duo_is_left_alone(serve, messages):
    config = serve(table=None, attention_backend=None)
    assert config.cache_config.enable_prefix_caching is True
    assert messages == []
