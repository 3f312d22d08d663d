"""The Triton kernels' host side: which tensors they serve, their arguments, their workspace.

Tensors on a GPU run the Triton kernels; nothing falls back by itself. Nothing here looks at a tensor's
contents or waits for the device: what decides a launch is known on the host.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch

from vllm_duo.ops.batch import (
    Batch,
    HeadMap,
    LayerCaches,
    PagedTable,
    RingTable,
    SnapshotCopy,
)

RetrievalPrefill = Callable[[torch.Tensor, HeadMap, LayerCaches, Batch, float, torch.Tensor], None]
"""Attention of the prefills' retrieval heads: query, heads, caches, batch, scale, output."""

INTERPRETED_PROGRAMS = 6
"""Programs to spread decode over without a GPU: few enough that a test splits and merges."""

PROGRAMS_PER_PROCESSOR = 2

LARGE_SHARED_BYTES = 160 << 10
"""Shared memory of a multiprocessor from which on tiles are of full size."""

MAX_DECODE_QUERY = 8
"""Longest query of the decode kernel, in tokens: one and up to seven drafts."""

ORDER_HEADER = 4
"""Numbers before the blocks of a snapshot copy: 1 to store or 0 to restore, request, tokens, blocks."""


def runs(tensor: torch.Tensor) -> bool:
    """Whether the Triton kernels serve this tensor."""
    return tensor.is_cuda


def implementation(tensor: torch.Tensor, reference: ModuleType) -> ModuleType:
    """The operator's module for this tensor: its Triton kernel on a GPU, else the reference.

    Args:
        tensor: decides by its device.
        reference: the operator's ``reference`` module, beside which ``triton`` lies.
    """
    if not runs(tensor):
        return reference
    return importlib.import_module(f"{reference.__package__}.triton")


@functools.cache
def num_programs(device: torch.device) -> int:
    """Programs that keep the device busy; the same for every step, so that grids can be fixed."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    properties = torch.cuda.get_device_properties(device)
    return PROGRAMS_PER_PROCESSOR * properties.multi_processor_count


def block(size: int, least: int = 1) -> int:
    """The power of two that holds ``size``, at least ``least``."""
    return max(1 << max(size - 1, 0).bit_length(), least)


@dataclass(frozen=True, eq=False)
class ClassArguments:
    """One head class of a layer, as kernels take it; a class without heads has stand-ins.

    Attributes:
        cache: [N, H, P, 2 * D].
        heads: [H] int32 on the device, the class's KV heads.
        table: [B, width] int32.
        page: P, in tokens.
        count: H.
    """

    cache: torch.Tensor
    heads: torch.Tensor
    table: torch.Tensor
    page: int
    count: int

    def pointers(self) -> tuple[object, ...]:
        """Cache, its strides over blocks, heads and tokens, the heads, the table, its row stride."""
        stride = self.cache.stride() if self.count else (0, 0, 0)
        rows = self.table.stride(0) if self.count else 0
        return (self.cache, *stride[:3], self.heads, self.table, rows)


def head_indices(heads: HeadMap) -> tuple[torch.Tensor, torch.Tensor]:
    """[R] and [S] int32, a layer's heads as the kernels read them.

    A layer has them made before anything is captured: within a CUDA graph it would be the graph's
    replay that fills them, and every other step would read what was not written yet.
    """
    return heads.memo("int32", lambda: (heads.retrieval.int(), heads.streaming.int()))


def rows_from(arguments: ClassArguments, first: int) -> ClassArguments:
    """The same with the block table of the requests from ``first`` on."""
    return replace(arguments, table=arguments.table[first:]) if arguments.count else arguments


def class_arguments(
    heads: HeadMap,
    caches: LayerCaches,
    stand_in: torch.Tensor,
    *,
    retrieval: bool = True,
    streaming: bool = True,
) -> tuple[ClassArguments, ClassArguments]:
    """Arguments of both classes; one that is switched off counts as having no heads.

    Args:
        heads: the layer's head classes.
        caches: the layer's caches.
        stand_in: a tensor of the caches' dtype, passed where there is no cache.
        retrieval: whether the retrieval heads take part.
        streaming: whether the streaming heads take part.
    """
    of_retrieval, of_streaming = head_indices(heads)
    return (
        _arguments(of_retrieval, caches.retrieval, caches.paged, stand_in, retrieval),
        _arguments(of_streaming, caches.streaming, caches.ring, stand_in, streaming),
    )


def _arguments(
    heads: torch.Tensor,
    cache: torch.Tensor | None,
    table: PagedTable | RingTable | None,
    stand_in: torch.Tensor,
    used: bool,
) -> ClassArguments:
    if cache is None or table is None or not used:
        return ClassArguments(stand_in, heads, heads, 1, 0)
    if cache.stride(-1) != 1 or table.block_table.stride(-1) != 1:
        raise ValueError(
            "caches and block tables must be contiguous in their last dimension, got strides "
            f"{cache.stride()} and {table.block_table.stride()}"
        )
    return ClassArguments(cache, heads, table.block_table, table.block_size, len(heads))


def ring_sizes(caches: LayerCaches) -> tuple[int, int, int]:
    """sink_size, recent_size and ring_size; stand-ins where the layer has no streaming head."""
    ring = caches.ring
    return (0, 1, 1) if ring is None else (ring.sink_size, ring.recent_size, ring.ring_size)


def check_rows(**tensors: torch.Tensor) -> None:
    """Check that tensors can be read row by row.

    Raises:
        ValueError: one is not contiguous in its last dimension.
    """
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}"
            )


def longest_query(batch: Batch, first: int, last: int) -> int:
    """Longest query of requests ``first`` to ``last - 1``, in tokens; known on the host."""
    return int(batch.query_lens[first:last].max(initial=0))


def decode_rows(longest: int, group: int) -> int:
    """Rows of a decode tile: the queries of a request times the query heads of a KV head."""
    return block(longest * group, 16)


def reserve(device: torch.device, longest: int, group: int, head_size: int) -> None:
    """Get the decode workspace of the longest queries before any CUDA graph is captured."""
    workspace(device, 2 * num_programs(device) * decode_rows(longest, group), head_size)


@dataclass(frozen=True)
class Tiling:
    """How an attention program takes keys and values.

    Attributes:
        tokens: of a tile.
        buffers: tiles that a loop holds in shared memory, the one being computed among them: at least
            two where they fit, so that the next one is on its way meanwhile.
        warps: of a program.
    """

    tokens: int
    buffers: int
    warps: int


def tiling(head_size: int, element_bytes: int, device: torch.device) -> Tiling:
    """Tiles for rows of this size; a tile of up to 64 keys and its values fill 32 KiB at most.

    Two programs are to fit on a multiprocessor: with up to 64 KiB of tiles each, and half as much again
    where Hopper's products read shared memory while they run. Where a multiprocessor has 100 KiB of
    shared memory (compute capabilities 8.6, 8.9 and 12.0), tiles and buffers are half as large. Four
    warps spill registers once rows are 512 bytes long.

    Args:
        head_size: D.
        element_bytes: of the caches' dtype.
        device: that runs the program.
    """
    row_bytes = block(head_size, 16) * element_bytes
    tile_bytes = 32768 if shared_bytes(device) >= LARGE_SHARED_BYTES else 16384
    tokens = min(64, max(16, tile_bytes // (2 * row_bytes)))
    buffers = min(4, 2 * tile_bytes // (2 * tokens * row_bytes))
    return Tiling(tokens, max(buffers, 1), 8 if row_bytes >= 512 else 4)


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory of a multiprocessor; without a GPU that of an H100."""
    if device.type != "cuda":
        return 228 << 10
    found: int = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return found


_workspaces: dict[torch.device, list[torch.Tensor]] = {}


def workspace(device: torch.device, rows: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 space for the partial results of ``rows`` query rows, shared by all layers.

    It grows to the largest request and is never freed, since captured graphs point into it.

    Returns:
        Partial outputs [rows, head_size] and log-sum-exps [rows], uninitialised.

    Raises:
        RuntimeError: it would have to grow while a CUDA graph is being captured.
    """
    needed = rows * (head_size + 1)
    kept = _workspaces.setdefault(device, [])
    if not kept or len(kept[-1]) < needed:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the workspace needs {needed} elements and a CUDA graph is being captured: reserve "
                "it before (vllm_duo.ops.gpu.workspace)"
            )
        kept.append(torch.empty(needed, dtype=torch.float32, device=device))
    flat = kept[-1]
    return flat[: rows * head_size].view(rows, head_size), flat[rows * head_size : needed]


def pack_copies(copies: Sequence[SnapshotCopy], width: int) -> torch.Tensor:
    """A step's snapshot copies as their kernel takes them, on the device of their blocks.

    Args:
        copies: of the step, in order; at least one.
        width: columns of the ring's block table.

    Returns:
        [1 + copies, ORDER_HEADER + width] int32: the number of copies, then one row a copy.
    """
    packed = torch.zeros(1 + len(copies), ORDER_HEADER + width, dtype=torch.int32)
    packed[0, 0] = len(copies)
    for row, copy in zip(packed[1:], copies, strict=True):
        header = (int(copy.store), copy.row, copy.num_tokens, len(copy.blocks))
        row[:ORDER_HEADER] = torch.tensor(header, dtype=torch.int32)
    packed = packed.to(copies[0].blocks.device)
    for row, copy in zip(packed[1:], copies, strict=True):
        row[ORDER_HEADER : ORDER_HEADER + len(copy.blocks)] = copy.blocks
    return packed
