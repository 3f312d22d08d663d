"""What vllm-duo refuses, all reasons at once and before weights load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_duo.checkpoint_cache import checkpoint_cache, find_quantisation
from vllm_duo.config import SECTION
from vllm_duo.drafts import DRAFTS_OF_LAYERS, DRAFTS_OF_TOKENS, DRAFTS_WITHOUT_CACHES
from vllm_duo.kv_cache.formats import FORMATS
from vllm_duo.kv_cache.ranks import split_problem
from vllm_duo.kv_transfer.refusals import connector_refusals
from vllm_duo.model_facts import (
    MULTIMODAL_WITH_LAYERS_THAT_DRAFT,
    ModelFacts,
    draft_refusals,
    model_refusals,
)
from vllm_duo.windows import layer_windows

if TYPE_CHECKING:
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, VllmConfig
    from vllm.config.cache import CacheDType

UNQUANTISED_CACHE_DTYPES: tuple[CacheDType, ...] = ("auto", "float16", "bfloat16")
"""vLLM's names for KV caches of the model's own kind of numbers."""

CACHE_DTYPES: tuple[CacheDType, ...] = (*UNQUANTISED_CACHE_DTYPES, *FORMATS)
"""The same with the quantised ones that duo serves (``kv_cache/formats.py``)."""


def refusals(vllm_config: VllmConfig) -> list[str]:
    """Every reason why this server cannot run with duo; empty where it can."""
    return [
        *platform_refusals(vllm_config.additional_config),
        *model_refusals(facts_of(vllm_config.model_config)),
        *_parallelism(vllm_config),
        *_speculation(vllm_config),
        *_features(vllm_config),
    ]


def check_supported(vllm_config: VllmConfig) -> None:
    """Refuse what does not work.

    Raises:
        NotImplementedError: with every reason.
    """
    refuse(refusals(vllm_config))


def refuse(reasons: list[str]) -> None:
    """Refuse a server for these reasons, if there are any.

    Raises:
        NotImplementedError: with every reason.
    """
    if reasons:
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        raise NotImplementedError(
            f"--attention-backend duo does not support this server:\n{listed}\n"
            "Change what is listed, or serve with vLLM's own attention backend."
        )


def known_limits(vllm_config: VllmConfig) -> Iterator[str]:
    """What vLLM itself gets wrong on this server with any attention backend, and how to avoid it."""
    from vllm.platforms import current_platform

    lora = vllm_config.lora_config
    if lora is not None and current_platform.is_cpu():
        yield (
            "vLLM on CPUs lets requests without an adapter use the adapter in the last of the "
            f"{lora.max_loras} slots whenever they run beside one that has an adapter: serve at most "
            f"{lora.max_loras - 1} adapters, or raise --max-loras"
        )


def platform_refusals(additional_config: Any = None) -> Iterator[str]:
    """Why duo cannot serve on the platform that vLLM chose, if so.

    Args:
        additional_config: vLLM's, which may allow a platform that is untested.
    """
    from vllm.platforms import current_platform

    settings = _settings(additional_config)
    if current_platform.is_cpu():
        chosen = settings.get("retrieval_prefill", "auto")
        if chosen != "auto":
            yield f'"retrieval_prefill": {chosen!r}: it chooses a GPU\'s kernel, remove it'
    elif not current_platform.is_cuda():
        yield (
            f"the platform {current_platform.device_name}: vllm-duo has kernels for CPUs and for "
            "NVIDIA GPUs"
        )
    elif settings.get("untested_gpu") is not True:
        yield (
            f"the platform {current_platform.device_name}: this release's GPU kernels have run in "
            "Triton's interpreter only, never on a GPU (docs/gpu.md); to try them all the same, set "
            '"untested_gpu": true in the "duo" section of --additional-config'
        )


def _settings(additional_config: Any) -> Mapping[str, Any]:
    """The "duo" section as it was given; bad ones are refused elsewhere."""
    section = additional_config.get(SECTION) if isinstance(additional_config, dict) else None
    return section if isinstance(section, Mapping) else {}


def facts_of(model: ModelConfig) -> ModelFacts:
    """What vLLM knows of the model."""
    text, outer = model.hf_text_config, model.hf_config
    keys = ("quantization_config", "compression_config")
    quantisation = find_quantisation(
        *({key: getattr(part, key, None) for key in keys} for part in (outer, text))
    )

    def setting(name: str) -> Any:
        return getattr(text, name, None)

    num_layers = model.get_total_num_hidden_layers()
    return ModelFacts(
        name=model.model,
        num_layers=num_layers,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        runner_type=model.runner_type,
        uses_mla=model.use_mla,
        is_encoder_decoder=model.is_encoder_decoder,
        has_other_layers=model.is_hybrid or model.is_attention_free,
        multimodal=_multimodal_type(model) if model.supports_multimodal_inputs else None,
        sees_both_ways=model.is_mm_prefix_lm,
        windows=layer_windows(num_layers, model.get_sliding_window(), setting("layer_types")),
        attention_chunk_size=setting("attention_chunk_size"),
        soft_caps_logits=bool(setting("attn_logit_softcapping") or setting("attn_logits_soft_cap")),
        uses_alibi=bool(model.uses_alibi),
        is_not_causal=model.rswa_window is not None or model.is_diffusion,
        has_noops=model.has_noops,
        own_cache=checkpoint_cache(quantisation),
        shares_caches=bool(setting("num_kv_shared_layers")),
    )


def _multimodal_type(model: ModelConfig) -> str | None:
    """The model type of a model that can take more than text, even if the rest is switched off."""
    if not model.is_multimodal_model:
        return None
    model_type = str(model.hf_config.model_type)
    if model.using_transformers_backend():
        return f"{model_type} in vLLM's Transformers backend"
    return model_type


def dtype_name(model: ModelConfig) -> str:
    """The model's own kind of numbers, by vLLM's name."""
    return str(model.dtype).removeprefix("torch.")


def cache_dtype_refusal(cache_dtype: str, model_dtype: str) -> str | None:
    """Why a KV cache of this type cannot be served, if so; both are vLLM's names."""
    if cache_dtype not in CACHE_DTYPES:
        return f"--kv-cache-dtype {cache_dtype}: use one of {', '.join(CACHE_DTYPES)}"
    if cache_dtype not in ("auto", model_dtype, *FORMATS):
        return f"--kv-cache-dtype {cache_dtype} for a model in {model_dtype}: use auto"
    return None


def parallel_refusal(flag: str, size: int) -> str | None:
    """Why a server of this parallel size cannot run, if so."""
    return f"{flag} {size}: not tested yet, set it to 1" if size > 1 else None


def pipeline_refusal(size: int) -> str | None:
    """Why a server of so many pipeline stages cannot run on this platform, if so."""
    from vllm.platforms import current_platform

    if size > 1 and current_platform.is_cpu():
        return (
            f"--pipeline-parallel-size {size}: vLLM's model runner for CPUs fails with it whatever the "
            "attention backend, set it to 1"
        )
    return None


def executor_refusals(parallel: ParallelConfig) -> Iterator[str]:
    """Why duo cannot serve with the processes that vLLM would start, if so."""
    from vllm.platforms import current_platform

    backend, replicas = parallel.distributed_executor_backend, parallel.data_parallel_size
    if backend == "ray" and not current_platform.ray_device_key:
        yield (
            "--distributed-executor-backend ray: vLLM does not run Ray on the platform "
            f"{current_platform.device_name}, use mp"
        )
    elif backend == "ray" and replicas > 1:
        yield (
            f"--distributed-executor-backend ray with --data-parallel-size {replicas}: not tested "
            "yet, use one of them"
        )
    elif backend not in ("mp", "ray") and parallel.world_size > 1:
        yield f"--distributed-executor-backend {backend}: not tested yet, use mp"
    if replicas > 1 and parallel.data_parallel_backend != "mp":
        yield f"--data-parallel-backend {parallel.data_parallel_backend}: not tested yet, use mp"


def _parallelism(vllm_config: VllmConfig) -> Iterator[str]:
    parallel = vllm_config.parallel_config
    ranks, heads = parallel.tensor_parallel_size, vllm_config.model_config.get_total_num_kv_heads()
    if ranks > 1 and (problem := split_problem(heads, ranks)):
        yield f"--tensor-parallel-size {ranks}: {problem}"
    yield from executor_refusals(parallel)
    if reason := pipeline_refusal(parallel.pipeline_parallel_size):
        yield reason
    for name, value in (
        ("--nnodes", parallel.nnodes),
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
    ):
        if reason := parallel_refusal(name, value):
            yield reason
    if parallel.use_ubatching:
        yield (
            "microbatches (--enable-dbo, --ubatch-size): their threads would share one workspace, "
            "leave them out"
        )


def _quantised_cache(cache: CacheConfig) -> Iterator[str]:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        yield (
            f"--kv-cache-dtype {cache.cache_dtype}: this release's GPU kernels do not read quantised "
            "caches, use auto"
        )


def _speculation(vllm_config: VllmConfig) -> Iterator[str]:
    """Why the drafts of ``--speculative-config`` cannot be served, if so."""
    from vllm.platforms import current_platform

    speculation = vllm_config.speculative_config
    if speculation is None:
        return
    if not current_platform.is_cpu():
        yield from _drafts_on_gpu(speculation.num_speculative_tokens)
    if vllm_config.scheduler_config.async_scheduling:
        yield (
            "speculative decoding with --async-scheduling: a step would be planned before it is known "
            "which drafts of the last one stay; use --no-async-scheduling"
        )
    method = speculation.method
    if method in DRAFTS_WITHOUT_CACHES:
        return
    if method in DRAFTS_OF_LAYERS:
        yield from _draft_model(vllm_config)
        return
    yield (
        f"speculative decoding by {method!r}: not tested yet; use one of "
        f"{', '.join((*DRAFTS_WITHOUT_CACHES, *DRAFTS_OF_LAYERS))} or remove --speculative-config"
    )


def _drafts_on_gpu(drafts: int) -> Iterator[str]:
    """Why so many drafts cannot be served on a GPU, if so."""
    # Not at the top: `vllm-duo plan` asks this module, and does without torch.
    from vllm_duo.ops.gpu import MAX_DECODE_QUERY

    if drafts >= MAX_DECODE_QUERY:
        yield (
            f"speculative decoding on a GPU with {drafts} drafts: its decode kernel, which CUDA graphs "
            f"hold, takes {MAX_DECODE_QUERY - 1} at most: set num_speculative_tokens to that or fewer"
        )


def draft_model_refusals(
    stages: int, multimodal: str | None, own_dtype: str, skips_layers: bool
) -> Iterator[str]:
    """Why no draft model or EAGLE head can be served beside a model, if so.

    Args:
        stages: of the pipeline.
        multimodal: config.json's model type of a model that can take more than text; None: text alone.
        own_dtype: of the KV cache that the model's checkpoint asks for; auto: for none.
        skips_layers: whether some of the model's layers keep an unquantised cache.
    """
    if own_dtype != "auto":
        yield (
            f"what drafts: not tested beside a checkpoint that asks for a KV cache in {own_dtype}; use "
            f"{DRAFTS_OF_TOKENS[0]}"
        )
    if skips_layers:
        yield (
            "what drafts: --kv-cache-dtype-skip-layers means layers of the model and would mean layers "
            f"that draft as well: leave it out or use {DRAFTS_OF_TOKENS[0]}"
        )
    if multimodal is not None and multimodal not in MULTIMODAL_WITH_LAYERS_THAT_DRAFT:
        yield (
            f"what drafts: not tested with a multimodal model of the type {multimodal}, expected one "
            f"of {', '.join(MULTIMODAL_WITH_LAYERS_THAT_DRAFT)}; use {DRAFTS_OF_TOKENS[0]}"
        )
    if stages > 1:
        yield (
            f"what drafts: --pipeline-parallel-size {stages} is not tested with one; use "
            f"{DRAFTS_OF_TOKENS[0]} or set it to 1"
        )


def _draft_model(vllm_config: VllmConfig) -> Iterator[str]:
    """Why this model cannot draft, if so."""
    speculation = vllm_config.speculative_config
    parallel = vllm_config.parallel_config
    ranks, own = parallel.tensor_parallel_size, speculation.draft_tensor_parallel_size
    yield from draft_model_refusals(
        parallel.pipeline_parallel_size,
        _multimodal_type(vllm_config.model_config),
        facts_of(vllm_config.model_config).own_cache.dtype,
        bool(vllm_config.cache_config.kv_cache_dtype_skip_layers),
    )
    draft = speculation.draft_model_config
    # To vLLM a draft takes no images, whatever model it is.
    facts = replace(facts_of(draft), multimodal=_multimodal_type(draft))
    yield from draft_refusals(facts, ranks)
    if own not in (None, ranks):
        yield (
            f"what drafts: draft_tensor_parallel_size {own}: it runs on the model's {ranks} ranks, "
            "leave it out"
        )
    if speculation.parallel_drafting:
        yield "what drafts: drafting in parallel is not tested, leave parallel_drafting out"
    backend = vllm_config.attention_config.backend
    if speculation.attention_backend not in (None, backend):
        yield (
            f"what drafts: the attention backend {speculation.attention_backend.name}: all "
            "attention layers must run duo, leave it out"
        )
    cache_dtype = speculation.kv_cache_dtype
    if cache_dtype is not None and (
        reason := cache_dtype_refusal(cache_dtype, dtype_name(vllm_config.model_config))
    ):
        yield f"what drafts: {reason.replace('--kv-cache-dtype', 'kv_cache_dtype', 1)}"


def _features(vllm_config: VllmConfig) -> Iterator[str]:
    cache = vllm_config.cache_config
    yield from connector_refusals(vllm_config)
    if vllm_config.ec_transfer_config is not None:
        yield "encoder caches of other servers (--ec-transfer-config): not tested yet, leave it out"
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield (
            "--disable-hybrid-kv-cache-manager: two kinds of cache need the hybrid manager, leave "
            "it out"
        )
    if reason := cache_dtype_refusal(cache.cache_dtype, dtype_name(vllm_config.model_config)):
        yield reason
    elif cache.cache_dtype in FORMATS:
        yield from _quantised_cache(cache)
    if cache.kv_sharing_fast_prefill:
        yield (
            "--kv-sharing-fast-prefill: it is for layers that share a KV cache, and with duo each "
            "layer has caches of its own; leave it out"
        )
    if cache.kv_offloading_size is not None:
        yield (
            "--kv-offloading-size: the offloading connector does not see the streaming caches; leave "
            "it out, or keep prefixes in files with DuoStorageConnector (docs/kv-storage.md)"
        )
    if vllm_config.attention_config.use_non_causal:
        yield (
            "attention that is not causal: streaming heads drop what a later token could still see; "
            "remove use_non_causal from --attention-config"
        )
    tried = _settings(vllm_config.additional_config).get("untested_model_runner") is True
    if vllm_config.use_v2_model_runner and not tried:
        yield "vLLM's model runner V2: not tested yet, set VLLM_USE_V2_MODEL_RUNNER=0"
    if vllm_config.attention_config.backend_per_kind:
        yield (
            "attention backends per kind of layer: all attention layers must run duo, remove "
            "backend_per_kind from --attention-config"
        )
