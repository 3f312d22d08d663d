"""The worker's side: copies between the pool's blocks and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vllm_duo.kv_transfer.orders import Load, Save
from vllm_duo.kv_transfer.pool_shape import PoolShape
from vllm_duo.kv_transfer.writer import Writer

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch


def pool_of(kv_caches: Mapping[str, torch.Tensor], shape: PoolShape) -> npt.NDArray[np.uint8]:
    """The pool that all caches are views of.

    Args:
        kv_caches: vLLM's, by layer.
        shape: of the pool.

    Returns:
        [blocks, block_bytes] uint8, the same memory.

    Raises:
        RuntimeError: the caches are not views of one such pool on the CPU.
    """
    import torch

    storages = {cache.untyped_storage().data_ptr() for cache in kv_caches.values()}
    first = next(iter(kv_caches.values()))
    num_bytes = shape.num_blocks * shape.block_bytes
    storage = first.untyped_storage()
    if len(storages) != 1 or first.device.type != "cpu" or storage.nbytes() != num_bytes:
        raise RuntimeError(
            f"expected all KV caches in one pool of {num_bytes} bytes on the CPU, got "
            f"{len(storages)} of {storage.nbytes()} bytes on {first.device}; this is a defect of "
            "vllm-duo, please report it with the server's flags"
        )
    flat = torch.empty(0, dtype=torch.uint8).set_(storage)
    pool: npt.NDArray[np.uint8] = flat.view(shape.num_blocks, shape.block_bytes).numpy()
    return pool


def load(pool: npt.NDArray[np.uint8], loads: Sequence[Load]) -> None:
    """Put what was read into its blocks.

    Args:
        pool: [blocks, block_bytes] uint8, mutated.
        loads: of the step.
    """
    for each in loads:
        pool[list(each.blocks), : each.data.shape[1]] = each.data


def save(pool: npt.NDArray[np.uint8], saves: Sequence[Save], writer: Writer) -> None:
    """Copy blocks and hand them to the writer.

    Args:
        pool: [blocks, block_bytes] uint8.
        saves: of the step.
        writer: takes what is not stored and does not wait to be.
    """
    for each in saves:
        num_bytes = sum(len(blocks) * width for blocks, width in each.blocks)
        if not writer.wants(each.key, num_bytes):
            continue
        if not each.replace and writer.store.has(each.key):
            continue
        # Indexing copies: later steps may overwrite the blocks.
        parts = [pool[list(blocks), :width] for blocks, width in each.blocks]
        views = [part.data.cast("B") for part in parts]
        writer.submit(each.key, views, each.when_ns)
