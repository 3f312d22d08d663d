"""What vllm-duo refuses, all reasons at once and before weights load."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

HEAD_SIZES = (16, 32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Head sizes that the operators are tested with or that stock vLLM's CPU kernels also serve."""

UNQUANTISED_CACHE_DTYPES = ("auto", "float16", "bfloat16")
"""vLLM's names for KV caches of the model's own kind of numbers."""


def refusals(vllm_config: VllmConfig) -> list[str]:
    """Every reason why this server cannot run with duo; empty where it can."""
    return [
        *_platform(),
        *_model(vllm_config.model_config),
        *_parallelism(vllm_config),
        *_features(vllm_config),
    ]


def check_supported(vllm_config: VllmConfig) -> None:
    """Refuse what does not work.

    Raises:
        NotImplementedError: with every reason.
    """
    reasons = refusals(vllm_config)
    if reasons:
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        raise NotImplementedError(
            f"--attention-backend duo does not support this server:\n{listed}\n"
            "Change what is listed, or serve with vLLM's own attention backend."
        )


def _platform() -> Iterator[str]:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield (
            f"the platform {current_platform.device_name}: this release of vllm-duo has kernels "
            "for vLLM's CPU platform only"
        )


def _model(model: ModelConfig) -> Iterator[str]:
    text = model.hf_text_config

    def setting(name: str) -> Any:
        return getattr(text, name, None)

    if model.runner_type != "generate":
        yield f"the task {model.runner_type!r}: only text generation keeps a KV cache"
    if model.use_mla:
        yield "multi-head latent attention (MLA): its cache has no KV heads to split"
    if model.is_encoder_decoder:
        yield "cross-attention (an encoder-decoder model)"
    if model.is_hybrid or model.is_attention_free:
        yield "layers without attention (Mamba, linear attention and their like)"
    if model.is_multimodal_model:
        yield "multimodal input: not tested yet"
    window = model.get_sliding_window()
    if window is not None:
        yield f"the model's own sliding window ({window} tokens)"
    if setting("attention_chunk_size"):
        yield f"chunked local attention ({setting('attention_chunk_size')} tokens)"
    if setting("attn_logit_softcapping") or setting("attn_logits_soft_cap"):
        yield "soft-capped attention logits"
    if model.uses_alibi:
        yield "ALiBi position biases"
    if model.rswa_window is not None or model.is_diffusion:
        yield "attention that is not causal over the whole request"
    if model.has_noops:
        yield "layers without attention among the model's layers"
    scheme = (getattr(model.hf_config, "quantization_config", None) or {}).get("kv_cache_scheme")
    if scheme:
        yield f"the checkpoint's own KV cache quantisation ({scheme})"
    if model.hf_config.model_type == "gpt_oss":
        yield "learned attention sinks (these are logits, not sink tokens)"
    if model.get_head_size() not in HEAD_SIZES:
        sizes = ", ".join(map(str, HEAD_SIZES))
        yield f"the head size {model.get_head_size()}: supported are {sizes}"
    if setting("num_kv_shared_layers"):
        yield "layers that share another layer's KV cache"


def _parallelism(vllm_config: VllmConfig) -> Iterator[str]:
    parallel = vllm_config.parallel_config
    for name, value in (
        ("--tensor-parallel-size", parallel.tensor_parallel_size),
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size),
        ("--data-parallel-size", parallel.data_parallel_size),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
    ):
        if value > 1:
            yield f"{name} {value}: not tested yet, set it to 1"


def _features(vllm_config: VllmConfig) -> Iterator[str]:
    cache = vllm_config.cache_config
    if vllm_config.speculative_config is not None:
        yield "speculative decoding: not tested yet, remove --speculative-config"
    if vllm_config.kv_transfer_config is not None:
        yield "KV connectors (--kv-transfer-config): they do not see the streaming caches"
    if vllm_config.kv_events_config is not None and (
        vllm_config.kv_events_config.enable_kv_cache_events
    ):
        yield "KV cache events (--kv-events-config): not tested yet"
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield "--disable-hybrid-kv-cache-manager: two kinds of cache need the hybrid manager"
    model_dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if cache.cache_dtype not in UNQUANTISED_CACHE_DTYPES:
        yield f"--kv-cache-dtype {cache.cache_dtype}: quantised caches are not tested yet, use auto"
    elif cache.cache_dtype not in ("auto", model_dtype):
        yield f"--kv-cache-dtype {cache.cache_dtype} for a model in {model_dtype}: use auto"
    if cache.kv_sharing_fast_prefill:
        yield "--kv-sharing-fast-prefill"
    if cache.kv_offloading_size is not None:
        yield "--kv-offloading-size: the offloading connector does not see the streaming caches"
    if vllm_config.attention_config.use_non_causal:
        yield "attention that is not causal"
    if vllm_config.use_v2_model_runner:
        yield "vLLM's model runner V2: not tested yet, set VLLM_USE_V2_MODEL_RUNNER=0"
    if vllm_config.attention_config.backend_per_kind:
        yield "attention backends per kind of layer: all attention layers must run duo"
