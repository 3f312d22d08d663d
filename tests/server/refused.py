"""Models and settings that are refused, with the reasons that are given."""

from __future__ import annotations

import pytest

from tests.server.configs import (
    BLOOM,
    CHUNKED,
    DECODER,
    DEEPSEEK,
    ENCODER,
    FALCON,
    FULL,
    GEMMA_2,
    GEMMA_3N,
    IDEFICS_3,
    JAMBA,
    LLAMA,
    LLAMA_4,
    MLA,
    PALIGEMMA,
    TOKENS,
    WHISPER,
    cache_scheme,
    config_json,
)

OTHER_SCALES = "quantised KV cache, other scales of the checkpoint"
ALIBI = "ALiBi position biases: duo's kernels add none"
HEAD_SIZES = "supported are 16, 32, 64, 80, 96, 112, 128, 160, 192, 224, 256"
REFUSED_MODELS = {
    "soft-capped logits": (GEMMA_2, "soft-capped attention logits: duo's kernels do not cap them"),
    "chunked local attention": (
        LLAMA_4 | CHUNKED,
        "chunked local attention (64 tokens): duo's kernels attend to all tokens, or to a sink and the "
        "recent ones",
    ),
    "ALiBi by model": (BLOOM, ALIBI),
    "ALiBi by setting": (FALCON, ALIBI),
    "multi-head latent attention (MLA)": (
        DEEPSEEK | MLA,
        "multi-head latent attention (MLA): its cache has no KV heads to split",
        f"the head size 48: {HEAD_SIZES}",
    ),
    "encoder-decoder models": (
        WHISPER | ENCODER | DECODER | TOKENS,
        "cross-attention (an encoder-decoder model): duo has caches for what a request's own tokens "
        "attend to alone",
    ),
    "images whose tokens see later ones": (
        PALIGEMMA,
        "images whose tokens attend to later ones (model type paligemma): duo's attention is causal; "
        "--language-model-only serves its text alone",
    ),
    "other multimodal models": (
        IDEFICS_3,
        "multimodal input (model type idefics3): not tested, expected one of llava, mistral3, "
        "qwen2_vl, qwen2_5_vl; --language-model-only serves its text alone",
    ),
    "Mamba and linear-attention layers": (
        JAMBA,
        "layers without attention (Mamba, linear attention and their like): their states would need a "
        "second layout of caches beside duo's",
    ),
    "layers that share a KV cache": (
        GEMMA_3N | FULL | {"num_kv_shared_layers": 1},
        "layers that share another layer's KV cache: with duo each layer has caches of its own",
    ),
    "embeddings and pooling": (
        config_json("BertModel", "bert"),
        "the task 'pooling': only text generation keeps a KV cache",
    ),
    "quantised KV cache, scales of each head": (
        LLAMA | cache_scheme(strategy="attn_head"),
        "the checkpoint's own KV cache quantisation: its scales are each head's own (strategy "
        "attn_head), and duo has one of a layer's keys and one of its values (strategy tensor)",
    ),
    "quantised KV cache, scales found while it runs": (
        LLAMA | cache_scheme(dynamic=True),
        "the checkpoint's own KV cache quantisation: its scales are found while it runs (dynamic), and "
        "vLLM reads scales from the checkpoint or takes 1",
    ),
    "other head sizes": (LLAMA | {"head_dim": 24}, f"the head size 24: {HEAD_SIZES}"),
}
# What docs/compatibility.md calls these models, where it is not by the key above.
ROWS = {
    "ALiBi by model": ("ALiBi",),
    "ALiBi by setting": ("ALiBi",),
    "quantised KV cache, scales of each head": (OTHER_SCALES,),
    "quantised KV cache, scales found while it runs": (OTHER_SCALES,),
}
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
    "KV cache in another float type than the model": (
        "--kv-cache-dtype bfloat16 for a model in float32: use auto",
        {"kv_cache_dtype": "bfloat16"},
    ),
    "hybrid KV cache manager switched off": (
        "--disable-hybrid-kv-cache-manager: two kinds of cache need the hybrid manager, leave it out",
        {"disable_hybrid_kv_cache_manager": True},
    ),
    "KV connectors of others": (
        "KV connectors (--kv-transfer-config) of others: they do not see the streaming caches; use "
        '"kv_connector": "DuoStorageConnector", "kv_connector_module_path": "vllm_duo.kv_transfer"',
        {"kv_transfer_config": CONNECTOR},
    ),
    "encoder caches of other servers": (
        "encoder caches of other servers (--ec-transfer-config): not tested yet, leave it out",
        {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}},
    ),
    "KV-sharing fast prefill": (
        "--kv-sharing-fast-prefill: it is for layers that share a KV cache, and with duo each layer "
        "has caches of its own; leave it out",
        {"kv_sharing_fast_prefill": True},
    ),
    "KV offloading": (
        "--kv-offloading-size: the offloading connector does not see the streaming caches; leave it "
        "out, or keep prefixes in files with DuoStorageConnector (docs/kv-storage.md)",
        {"kv_offloading_size": 1.0},
    ),
    "attention that is not causal": (
        "attention that is not causal: streaming heads drop what a later token could still see; remove "
        "use_non_causal from --attention-config",
        {"attention_backend": None, "attention_config": {"backend": "duo", "use_non_causal": True}},
    ),
    "microbatches (`--ubatch-size`)": (
        "microbatches (--enable-dbo, --ubatch-size): their threads would share one workspace, leave "
        "them out",
        {"ubatch_size": 2, "all2all_backend": "deepep_low_latency"},
    ),
    "attention backends per kind of layer": (
        "attention backends per kind of layer: all attention layers must run duo, remove "
        "backend_per_kind from --attention-config",
        {"attention_backend": None, "attention_config": PER_KIND},
    ),
}


def refused(cases):
    """Parameters of which each shows its rows of docs/compatibility.md."""
    return [
        pytest.param(case, id=name, marks=pytest.mark.refused(*ROWS.get(name, (name,))))
        for name, case in cases.items()
    ]
