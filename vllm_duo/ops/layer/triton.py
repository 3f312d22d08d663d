"""``attend_and_write`` on a GPU: all that a layer does in a step, in as few launches as are correct."""

from __future__ import annotations

import torch

from vllm_duo.ops import gpu
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches
from vllm_duo.ops.decode.triton import decode
from vllm_duo.ops.prefill.triton import prefill
from vllm_duo.ops.snapshot.triton import copy_snapshots
from vllm_duo.ops.validate import check_layer, check_query, check_sinks
from vllm_duo.ops.write_kv.triton import write_kv, write_retrieval, write_streaming


def attend_and_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
    scale: float,
    output: torch.Tensor,
    retrieval_prefill: gpu.RetrievalPrefill | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of all requests and the writes into both caches; arguments as in ``decode``.

    Snapshots are copied while the ring is as before the step. Retrieval blocks are written before
    anybody reads, since a request may resume at blocks that another one fills in this same step. The
    ring is written last, unless nothing that a query sees is overwritten (see ``writes_at_once``):
    then one launch writes both classes.

    Args:
        query: [T, Hq, D].
        key: [T, Hkv, D].
        value: [T, Hkv, D].
        heads: the layer's head classes.
        caches: mutated in place.
        batch: the step's requests.
        scale: factor on the logits.
        output: [T, Hq, D], mutated in place.
        retrieval_prefill: serves the prefills' retrieval heads instead of the Triton kernel. It reads
            the chunk's own tokens from the retrieval cache, which is written by then.
        sinks: [Hq] float32, as in ``decode``; ``retrieval_prefill`` is not told of them.

    Raises:
        ValueError: shapes, dtypes, devices or strides disagree, or both sinks and
            ``retrieval_prefill`` are given.
    """
    check_layer(key, value, heads, caches, batch)
    check_query(query, key, heads, output)
    check_sinks(sinks, query)
    if sinks is not None and retrieval_prefill is not None:
        raise ValueError(
            "learned sinks with another kernel for the prefills' retrieval heads, which leaves them "
            'out: pass no such kernel ("retrieval_prefill": "triton")'
        )
    copy_snapshots(key, value, heads, caches, batch)
    at_once = writes_at_once(caches, batch)
    write = write_kv if at_once else write_retrieval
    write(key, value, heads, caches, batch)
    decode(query, key, value, heads, caches, batch, scale, output, sinks)
    if batch.num_reqs > batch.num_decodes:
        elsewhere = retrieval_prefill is not None and caches.retrieval is not None
        prefill(
            query, key, value, heads, caches, batch, scale, output, sinks, retrieval=not elsewhere
        )
        if retrieval_prefill is not None and elsewhere:
            retrieval_prefill(query, heads, caches, batch, scale, output)
    if not at_once:
        write_streaming(key, value, heads, caches, batch)


def writes_at_once(caches: LayerCaches, batch: Batch) -> bool:
    """Whether the ring may be written before the step's attention.

    A chunk of q tokens overwrites what lies ring_size back; its first query sees recent_size - 1 back.
    So up to ring_size - recent_size + 1 tokens hurt nobody: one, and as many drafts as the ring has
    slack for. Worked example: recent 256, ring 259: chunks of up to 4 tokens.
    """
    if caches.ring is None:
        return True
    slack = caches.ring.ring_size - caches.ring.recent_size
    return gpu.longest_query(batch, 0, batch.num_reqs) <= 1 + slack
