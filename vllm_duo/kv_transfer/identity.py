"""All that a file's bytes depend on but the tokens, in 32 bytes.

Servers whose identities differ never see each other's files: they lie in other folders, and each file
says whose it is. So everything belongs in here that could change a key or a value, or its place in a
block; what cannot (the pool's size, the length of a step) stays out.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_duo.kv_transfer.pool_shape import PoolShape, first_spec
from vllm_duo.logging import get_logger
from vllm_duo.server_plan import resolve_plan
from vllm_duo.versions import installed

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = get_logger(__name__)

FORMAT = 1
"""Raised with every change of what a file holds."""
SOURCES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".py")
"""Files of a model folder that decide what it computes; its JSON files beside its config are small."""
DIGESTS = "digests"
ABOUT = "about.json"
LARGE_BYTES = 1 << 30
_CHUNK = 1 << 22


def identity(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, root: Path
) -> tuple[bytes, str]:
    """A server's identity.

    Args:
        vllm_config: the server's.
        kv_cache_config: its caches.
        root: the storage's folder, where digests of weights are kept.

    Returns:
        32 bytes, and the JSON that they are the SHA-256 of, for people.
    """
    text = json.dumps(describe(vllm_config, kv_cache_config, root), sort_keys=True, indent=1)
    return hashlib.sha256(text.encode()).digest(), text


def describe(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, root: Path) -> dict[str, Any]:
    """What the identity is made of."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    plan = resolve_plan(vllm_config)
    shape = PoolShape.of(kv_cache_config)
    hf_config = json.loads(model.hf_config.to_json_string(use_diff=False))
    hf_config.pop("_name_or_path", None)  # where the files lie does not matter
    return {
        "format": FORMAT,
        "versions": installed("vllm-duo", "vllm", "transformers", "torch"),
        "model": file_digests(model_folder(model), root),
        "hf_config": hf_config,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        # Some models choose their position embedding by it.
        "max_model_len": model.max_model_len,
        "cache_dtype": cache.cache_dtype,
        "prefix_caching_hash_algo": cache.prefix_caching_hash_algo,
        "retrieval_heads": hashlib.sha256(
            plan.resolved.selection.retrieval.astype("uint8").tobytes()
        ).hexdigest(),
        "windows": list(plan.windows),
        "page_tokens": shape.page_tokens,
        "block_bytes": shape.block_bytes,
        "groups": [_group(group) for group in kv_cache_config.kv_cache_groups],
        "places": [
            [tensor.layers, tensor.offset, tensor.layer_stride]
            for tensor in kv_cache_config.kv_cache_tensors
        ],
    }


def _group(group: Any) -> dict[str, Any]:
    """A group's layers, and of each its spec's fields that place bytes."""
    fields = (
        *("block_size", "num_kv_heads", "head_size", "head_size_v", "dtype", "kv_quant_mode"),
        *("page_size_bytes", "slots_per_block", "sink_size", "recent_size", "draft_size"),
    )
    of_layer = getattr(group.kv_cache_spec, "kv_cache_specs", {})
    first = first_spec(group)
    return {
        name: [
            type(of_layer.get(name, first)).__name__,
            *(str(getattr(of_layer.get(name, first), field, None)) for field in fields),
        ]
        for name in group.layer_names
    }


def model_folder(model: ModelConfig) -> Path:
    """The local files of a model, which vLLM has loaded.

    Raises:
        ValueError: there are none.
    """
    path = Path(model.model)
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(model.model, revision=model.revision, local_files_only=True)
    except Exception as error:
        raise ValueError(
            f"DuoStorageConnector: expected the files of {model.model} on this machine, to tell its "
            f"weights from others, got: {error}; name the model's folder"
        ) from error
    return Path(found)


def file_digests(folder: Path, root: Path) -> dict[str, str]:
    """SHA-256 of each file that decides what a model computes, by name.

    Args:
        folder: of the model; or its one file.
        root: the storage's folder: a file that has not changed since is not read again.
    """
    files = [folder] if folder.is_file() else sorted(folder.iterdir())
    files = [file for file in files if file.suffix in SOURCES and file.is_file()]
    num_bytes = sum(file.stat().st_size for file in files)
    cache = root / DIGESTS
    cache.mkdir(parents=True, exist_ok=True)
    if num_bytes > LARGE_BYTES and not all(_digest_file(cache, file).exists() for file in files):
        logger.info(
            "duo: reads %.1f GiB of weights once, to tell this model's prefixes from others'",
            num_bytes / (1 << 30),
        )
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as threads:
        digests = threads.map(lambda file: _digest(cache, file), files)
        return {file.name: digest for file, digest in zip(files, digests, strict=True)}


def _digest_file(cache: Path, file: Path) -> Path:
    """Where a file's digest is kept: under all that changes with the file; its ctime, none can set."""
    status = file.stat()
    times = (status.st_mtime_ns, status.st_ctime_ns)
    state = (str(file.resolve()), status.st_dev, status.st_ino, status.st_size, *times)
    return cache / hashlib.sha256(repr(state).encode()).hexdigest()


def _digest(cache: Path, file: Path) -> str:
    kept = _digest_file(cache, file)
    try:
        text = kept.read_text()
        if len(text) == 64:
            return text
    except OSError:
        pass
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    # What cannot be kept is found again the next time.
    with suppress(OSError):
        temporary = kept.with_name(f"{kept.name}.{os.getpid()}")
        temporary.write_text(digest.hexdigest())
        temporary.replace(kept)
    return digest.hexdigest()
