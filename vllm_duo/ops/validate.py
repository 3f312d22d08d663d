"""Shape and dtype checks that every operator makes before its kernel runs."""

from __future__ import annotations

import os

import torch

from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches

FULL_CHECKS = os.environ.get("VLLM_DUO_CHECK") == "1"
"""Also look into tables and tensors on the step; slow, for finding a defect."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_layer(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
) -> None:
    """Check what all operators share.

    Args:
        key: [T, Hkv, D] with T at least the batch's tokens.
        value: [T, Hkv, D].
        heads: the layer's head classes.
        caches: the layer's caches.
        batch: the step's requests.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
    """
    if caches.form is not None:
        raise ValueError(
            f"the caches are quantised ({caches.form.number}), which only the compiled CPU kernels "
            "read: serve with --kv-cache-dtype auto, or without VLLM_DUO_OPS=reference"
        )
    if key.ndim != 3 or key.shape != value.shape or key.dtype != value.dtype:
        raise ValueError(
            "key and value must be [T, Hkv, D] of one dtype, got "
            f"{tuple(key.shape)} {key.dtype} and {tuple(value.shape)} {value.dtype}"
        )
    if key.dtype not in FLOATS:
        raise ValueError(f"key must be one of {FLOATS}, got {key.dtype}")
    if key.shape[1] != heads.num_kv_heads:
        raise ValueError(f"key has {key.shape[1]} KV heads, the head map {heads.num_kv_heads}")
    if key.shape[0] < batch.num_tokens:
        raise ValueError(f"key has {key.shape[0]} tokens, the batch needs {batch.num_tokens}")
    for name, cache, table, picked in (
        ("retrieval", caches.retrieval, caches.paged, heads.retrieval),
        ("streaming", caches.streaming, caches.ring, heads.streaming),
    ):
        if len(picked) == 0:
            continue
        if cache is None or table is None:
            raise ValueError(f"the layer has {len(picked)} {name} heads and no {name} cache")
        expected = (len(picked), table.block_size, 2 * key.shape[2])
        if cache.ndim != 4 or tuple(cache.shape[1:]) != expected or cache.dtype != key.dtype:
            raise ValueError(
                f"{name} cache must be [N, {', '.join(map(str, expected))}] {key.dtype}, got "
                f"{tuple(cache.shape)} {cache.dtype}"
            )
        if cache.device != key.device:
            raise ValueError(f"{name} cache is on {cache.device}, key on {key.device}")
        if len(table.block_table) < batch.num_reqs:
            raise ValueError(
                f"{name} block table has {len(table.block_table)} rows, the batch has "
                f"{batch.num_reqs} requests"
            )


def check_query(
    query: torch.Tensor, key: torch.Tensor, heads: HeadMap, output: torch.Tensor
) -> None:
    """Check queries and output against the keys.

    Args:
        query: [T, Hq, D].
        key: [T, Hkv, D].
        heads: the layer's head classes.
        output: [T, Hq, D].

    Raises:
        ValueError: shapes, dtypes or devices disagree.
    """
    if query.ndim != 3 or query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"query must be [T, Hq, D] for key {tuple(key.shape)}, got {tuple(query.shape)}"
        )
    if query.shape[1] % heads.num_kv_heads:
        raise ValueError(
            f"query has {query.shape[1]} heads, not a multiple of {heads.num_kv_heads} KV heads"
        )
    if output.shape != query.shape or output.dtype != query.dtype or query.dtype != key.dtype:
        raise ValueError(
            f"output must be {tuple(query.shape)} {query.dtype} like query and key ({key.dtype}), "
            f"got {tuple(output.shape)} {output.dtype}"
        )


def check_sinks(sinks: torch.Tensor | None, query: torch.Tensor) -> None:
    """Check learned sinks against the queries; None passes.

    Args:
        sinks: [Hq] float32, contiguous.
        query: [T, Hq, D].

    Raises:
        ValueError: shape, dtype, strides or device disagree.
    """
    if sinks is None:
        return
    heads = query.shape[1]
    if tuple(sinks.shape) != (heads,) or sinks.dtype != torch.float32 or not sinks.is_contiguous():
        raise ValueError(
            f"sinks must be [{heads}] float32 and contiguous, one of each query head, got "
            f"{list(sinks.shape)} {sinks.dtype}: convert them once, when the weights have loaded"
        )
    if sinks.device != query.device:
        raise ValueError(f"sinks are on {sinks.device}, query on {query.device}")
