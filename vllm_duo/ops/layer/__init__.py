"""``attend_and_write``: all that a layer does in a step, in the order that makes it correct."""

from __future__ import annotations

import importlib

import torch

from vllm_duo.ops import cpu, gpu
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches
from vllm_duo.ops.decode import decode
from vllm_duo.ops.prefill import prefill
from vllm_duo.ops.snapshot import copy_snapshots
from vllm_duo.ops.snapshot.reference import check_copy
from vllm_duo.ops.write_kv import write_retrieval, write_streaming


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

    A request may resume at blocks that another one fills in this same step, so retrieval blocks and
    snapshots are written before anybody reads. The ring comes last: the chunk's first queries see
    keys that its last tokens overwrite. On the CPU one call does it all; ``triton.py`` says what a GPU
    does. ``retrieval_prefill`` is a GPU's kernel for the prefills' retrieval heads.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a copy does not fit its request.
    """
    if cpu.runs(key):
        if caches.ring is not None:
            for copy in caches.ring.copies:
                check_copy(batch, caches.ring, copy)
        cpu.run(
            cpu.WRITE_RETRIEVAL | cpu.COPY_SNAPSHOTS | cpu.ATTEND | cpu.WRITE_STREAMING,
            query,
            key,
            value,
            heads,
            caches,
            batch,
            scale=scale,
            output=output,
            requests=(0, batch.num_reqs),
            sinks=sinks,
        )
        return
    if gpu.runs(key):
        implementation = importlib.import_module("vllm_duo.ops.layer.triton")
        implementation.attend_and_write(
            query, key, value, heads, caches, batch, scale, output, retrieval_prefill, sinks
        )
        return
    write_retrieval(key, value, heads, caches, batch)
    copy_snapshots(key, value, heads, caches, batch)
    decode(query, key, value, heads, caches, batch, scale, output, sinks)
    prefill(query, key, value, heads, caches, batch, scale, output, sinks)
    write_streaming(key, value, heads, caches, batch)
