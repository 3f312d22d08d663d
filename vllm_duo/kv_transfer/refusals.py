"""Which servers the storage connector runs in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from vllm_duo.kv_transfer import CONNECTOR, MODULE
from vllm_duo.kv_transfer.settings import StorageSettings, folder_problem

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LOAD_FORMATS = ("auto", "hf", "safetensors", "pt")
"""Whose weights are the files of the model's folder."""
HASHES = ("sha256", "sha256_cbor")
"""Hashes of prefixes that two prefixes never share, and that are the same in every process."""


def connector_refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """Why ``--kv-transfer-config`` cannot be served, if it is given and so."""
    config = vllm_config.kv_transfer_config
    if config is None:
        return
    if config.kv_connector != CONNECTOR or config.kv_connector_module_path != MODULE:
        yield (
            "KV connectors (--kv-transfer-config) of others: they do not see the streaming caches; "
            f'use "kv_connector": "{CONNECTOR}", "kv_connector_module_path": "{MODULE}"'
        )
        return
    try:
        settings = StorageSettings.read(config.kv_connector_extra_config)
    except ValueError as error:
        yield f"{CONNECTOR}: kv_connector_extra_config: {error}"
    else:
        if problem := folder_problem(settings.path):
            yield f"{CONNECTOR}: kv_connector_extra_config: {problem}"
    for problem in _problems(vllm_config):
        yield f"{CONNECTOR}: {problem}"


def _problems(vllm_config: VllmConfig) -> Iterator[str]:
    """What the connector is not made for or not tested with."""
    from vllm.platforms import current_platform

    config, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
    assert config is not None
    if config.kv_role != "kv_both":
        yield f"kv_role {config.kv_role}: every server stores and loads, set kv_both"
    if not current_platform.is_cpu():
        yield "it has never run on a GPU: remove --kv-transfer-config"
    if parallel.world_size > 1 or parallel.data_parallel_size > 1:
        yield (
            "several ranks or replicas (--tensor-parallel-size, --data-parallel-size): not tested yet, "
            "set them to 1"
        )
    elif parallel.distributed_executor_backend not in (None, "uni", "mp"):
        yield (
            f"--distributed-executor-backend {parallel.distributed_executor_backend}: not tested yet, "
            "use mp"
        )
    if vllm_config.speculative_config is not None:
        yield "speculative decoding: not tested yet, remove --speculative-config"
    if vllm_config.scheduler_config.async_scheduling:
        yield "--async-scheduling: a step must have ended before its blocks are stored"
    if vllm_config.use_v2_model_runner:
        yield "vLLM's model runner V2: not tested yet, set VLLM_USE_V2_MODEL_RUNNER=0"
    cache = vllm_config.cache_config
    if cache.kv_cache_dtype_skip_layers:
        yield "--kv-cache-dtype-skip-layers: not tested yet, leave it out"
    if not cache.enable_prefix_caching:
        yield "--no-enable-prefix-caching: what is stored are the prefixes that vLLM caches"
    elif cache.prefix_caching_hash_algo not in HASHES:
        yield (
            f"--prefix-caching-hash-algo {cache.prefix_caching_hash_algo}: files outlive the server, "
            f"so two prefixes must never share a hash: use one of {', '.join(HASHES)}"
        )
    if vllm_config.load_config.load_format not in LOAD_FORMATS:
        yield (
            f"--load-format {vllm_config.load_config.load_format}: expected weights from files, to "
            f"tell them from others': use one of {', '.join(LOAD_FORMATS)}"
        )
    if vllm_config.weight_transfer_config is not None:
        yield "--weight-transfer-config: what is stored belongs to the weights of the start"
