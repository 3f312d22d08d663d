"""``copy_snapshots``: store and restore the streaming state of requests at block boundaries."""

from __future__ import annotations

import torch

from vllm_duo.ops import cpu, gpu
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches
from vllm_duo.ops.snapshot import reference
from vllm_duo.ops.snapshot.reference import check_copy
from vllm_duo.ops.validate import check_layer


def copy_snapshots(
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
) -> None:
    """Carry out the step's ``caches.ring.copies``, one after another.

    To be called before the step's attention, while the ring is as it was before the step. A state of
    n tokens is the sink and the last ``ring_size`` tokens before position n, in the same blocks and
    slots as the table of a request of n tokens: restoring copies blocks, storing copies blocks and
    adds the chunk's tokens before n.

    Args:
        key: [T, Hkv, D] fp32/bf16/fp16, after RoPE.
        value: [T, Hkv, D], likewise.
        heads: the layer's head classes.
        caches: the streaming cache is mutated in place.
        batch: the step's requests.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a copy does not fit its request.
    """
    if caches.ring is None or (not caches.ring.copies and caches.ring.orders is None):
        return
    if cpu.runs(key):
        for copy in caches.ring.copies:
            check_copy(batch, caches.ring, copy)
        cpu.run(cpu.COPY_SNAPSHOTS, None, key, value, heads, caches, batch)
        return
    check_layer(key, value, heads, caches, batch)
    gpu.implementation(key, reference).copy_snapshots(key, value, heads, caches, batch)
