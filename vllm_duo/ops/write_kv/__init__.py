"""``write_kv``: scatter a step's keys and values of all heads into both caches.

Its halves are called apart, retrieval heads before the step's attention and streaming heads after.
"""

from __future__ import annotations

import torch

from vllm_duo.ops import cpu, gpu
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches
from vllm_duo.ops.validate import check_layer
from vllm_duo.ops.write_kv import reference


def write_retrieval(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
) -> None:
    """Write the step's tokens into the retrieval cache; arguments as in ``write_kv``.

    May run before or after ``decode`` and ``prefill``: they take the step's own tokens from the
    activations. It runs before them, since vLLM lets a request resume at a prefix that another
    request computes in the same step.
    """
    if cpu.runs(key):
        cpu.run(cpu.WRITE_RETRIEVAL, None, key, value, heads, caches, batch)
        return
    check_layer(key, value, heads, caches, batch)
    gpu.implementation(key, reference).write_retrieval(key, value, heads, caches, batch)


def write_streaming(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
) -> None:
    """Write the step's tokens into the streaming cache; arguments as in ``write_kv``.

    To be called after ``decode`` and ``prefill``: these read the ring as it was before the step.
    """
    if cpu.runs(key):
        cpu.run(cpu.WRITE_STREAMING, None, key, value, heads, caches, batch)
        return
    gpu.implementation(key, reference).write_streaming(key, value, heads, caches, batch)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
) -> None:
    """Write the step's tokens into both caches, where a later query can see them.

    To be called after ``decode`` and ``prefill``: these read the ring as it was before the step.
    Retrieval heads store every token; streaming heads store the sink tokens and, of each chunk, the
    last ``ring_size`` ones. The null block 0 is never written.

    Args:
        key: [T, Hkv, D] fp32/bf16/fp16, after RoPE; rows beyond the batch's tokens are padding.
        value: [T, Hkv, D], likewise.
        heads: the layer's head classes.
        caches: mutated in place.
        batch: the step's requests.

    Raises:
        ValueError: shapes, dtypes or devices disagree.

    Source: DuoAttention, arXiv:2410.10819, section 2.3.
    """
    write_retrieval(key, value, heads, caches, batch)
    write_streaming(key, value, heads, caches, batch)
