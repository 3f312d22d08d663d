"""Which keys a query tile meets, in pieces: the context's blocks, sink, ring, and the chunk.

A piece says where its keys lie and which query slot sees them. Pieces depend on the step and on a
block table, not on the layer, so all layers of a group share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from vllm_duo.ops.batch import (
    Batch,
    BoolArray,
    HeadMap,
    IntArray,
    LayerCaches,
    PagedTable,
    RingTable,
)
from vllm_duo.ops.tiles import TiledAttention, Tiles

GATHER_ELEMENTS = 1 << 23
"""Bound on the elements of a piece's keys and values, or of its logits (32 MiB in float32)."""

CHUNK_STEP_TOKENS = 256
"""Keys of the chunk that are met at once; shorter steps skip more of what is not causal."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Keys of some tiles, in a cache (``blocks``) or in the chunk (``tokens``).

    Attributes:
        rows: [n] tiles that the piece belongs to; None for all.
        visible: [n, 1 or TQ, K] bool; None if every query slot sees every key.
        hidden: [n, 1, K, 1] bool, keys that no query slot sees; None if there are none. Their
            values may be garbage, even NaN, so they are cleared instead of multiplied by 0.
        blocks: [n, w] of whole blocks, or [n, K] with ``offsets``.
        offsets: [n, K] offset in each block; None for whole blocks.
        tokens: [n, K] flat token index in the chunk; None for a piece in a cache.
    """

    rows: torch.Tensor | None
    visible: torch.Tensor | None
    hidden: torch.Tensor | None
    blocks: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    tokens: torch.Tensor | None = None

    def gather(
        self,
        kv_cache: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        heads: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy the keys and values, each [n, H, K, D].

        Args:
            kv_cache: [N, H, P, 2 * D].
            key: [T, Hkv, D].
            value: [T, Hkv, D].
            heads: [H] int64, the class's KV heads.
        """
        if self.tokens is not None:
            tokens = self.tokens[:, None]
            keys, values = key[tokens, heads[:, None]], value[tokens, heads[:, None]]
        else:
            assert self.blocks is not None
            rows = torch.arange(kv_cache.shape[1], device=kv_cache.device)[:, None]
            blocks = self.blocks[:, None]
            if self.offsets is None:
                both = kv_cache[blocks, rows].flatten(2, 3)
            else:
                both = kv_cache[blocks, rows, self.offsets[:, None]]
            keys, values = both.chunk(2, dim=-1)
        if self.hidden is not None:
            values = values.masked_fill_(self.hidden, 0.0)
        return keys, values


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
    tiles: Tiles,
    scale: float,
    output: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of both classes for the given tiles; arguments as in ``vllm_duo.ops.prefill``."""
    classes = (
        (caches.retrieval, caches.paged, heads.retrieval, _retrieval_pieces),
        (caches.streaming, caches.ring, heads.streaming, _streaming_pieces),
    )
    queries_per_key = tiles.size * query.shape[1] // heads.num_kv_heads
    for kv_cache, table, picked, make in classes:
        if kv_cache is None or table is None:
            continue
        elements = len(picked) * max(2 * key.shape[-1], queries_per_key)
        plan = partial(_plan, make, tiles, table, elements, key.device)
        pieces = batch.memo((tiles, table, elements), plan)
        state = TiledAttention(query, picked, heads.num_kv_heads, tiles, scale, sinks)
        _add_pieces(state, pieces, kv_cache, key, value)
        state.store(output)


def _plan(make: Callable[..., Iterator[Piece]], *arguments: object) -> list[Piece]:
    return list(make(*arguments))


def _add_pieces(
    state: TiledAttention,
    pieces: list[Piece],
    kv_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> None:
    for piece in pieces:
        keys, values = piece.gather(kv_cache, key, value, state.heads)
        rows = slice(None) if piece.rows is None else piece.rows
        state.add(keys, values, piece.visible, rows)


def _retrieval_pieces(
    tiles: Tiles, table: PagedTable, elements_per_key: int, device: torch.device
) -> Iterator[Piece]:
    """The context, block by block, then the chunk up to each query."""
    size = table.block_size
    step = max(_step(tiles, elements_per_key) // size, 1)
    for low in range(0, -(-int(tiles.context.max()) // size), step):
        rows = np.flatnonzero(tiles.context > low * size)
        high = min(low + step, -(-int(tiles.context[rows].max()) // size))
        at = np.arange(low * size, high * size)
        visible = at < tiles.context[rows, None]
        request = torch.from_numpy(tiles.request[rows]).to(device)
        yield _piece(
            visible[:, None],
            device,
            rows=_rows(rows, tiles, device),
            blocks=table.block_table[request, low:high].long(),
        )
    yield from _chunk_pieces(tiles, tiles.context, None, elements_per_key, device)


def _streaming_pieces(
    tiles: Tiles, table: RingTable, elements_per_key: int, device: torch.device
) -> Iterator[Piece]:
    """Sink and ring, then the chunk: cost per tile independent of the context's length."""
    step = _step(tiles, elements_per_key)
    request = torch.from_numpy(tiles.request).to(device)[:, None]
    query = tiles.query_position[..., None]
    for slots in _used_slots(tiles, table, step):
        at = _cached_positions(table, tiles.context, slots)
        column, offset = table.table_slots(np.maximum(at, 0))
        held = at[:, None]
        recent = held > query - table.recent_size
        yield _piece(
            (held >= 0) & ((held < table.sink_size) | recent),
            device,
            blocks=table.block_table[request, torch.from_numpy(column).to(device)].long(),
            offsets=torch.from_numpy(offset).to(device),
        )
    yield from _sink_in_chunk(tiles, table.sink_size, step, device)
    least = np.maximum(tiles.context, table.sink_size)
    yield from _chunk_pieces(tiles, least, table.recent_size, elements_per_key, device)


def _used_slots(tiles: Tiles, table: RingTable, step: int) -> Iterator[IntArray]:
    """The slots that hold a token of some tile's context, sink slots first, ``step`` at a time."""
    longest = int(tiles.context.max())
    sink = np.arange(min(table.sink_size, longest))
    in_ring = min(table.ring_size, max(longest - table.sink_size, 0))
    slots = np.concatenate([sink, table.sink_size + np.arange(in_ring)])
    for low in range(0, len(slots), step):
        yield slots[low : low + step]


def _cached_positions(table: RingTable, context: IntArray, slots: IntArray) -> IntArray:
    """[NT, K] position that each of the K ``slots`` holds; -1 for an empty slot.

    Slots below ``sink_size`` are the sink's, the others the ring's.
    """
    sink_at = np.where(slots < context[:, None], slots, -1)
    slot = slots - table.sink_size
    written = np.maximum(context - table.sink_size, 0)[:, None]  # tokens that went into the ring
    turns = (written - 1 - slot) // table.ring_size
    ring_at = np.where(slot < written, slots + turns * table.ring_size, -1)
    return np.where(slots < table.sink_size, sink_at, ring_at)


def _sink_in_chunk(
    tiles: Tiles, sink_size: int, step: int, device: torch.device
) -> Iterator[Piece]:
    """The sink tokens that arrive in this step's chunk itself."""
    last = tiles.position + tiles.length
    for low in range(int(tiles.context.min()), min(sink_size, int(last.max())), step):
        at = np.arange(low, min(low + step, sink_size, int(last.max())))
        rows = np.flatnonzero((tiles.context <= at[-1]) & (last > low))
        context = tiles.context[rows, None]
        usable = (at >= context) & (at < last[rows, None])
        token = np.where(usable, tiles.chunk_start[rows, None] + at - context, 0)
        visible = usable[:, None] & (at <= tiles.query_position[rows, :, None])
        yield _piece(
            visible,
            device,
            rows=_rows(rows, tiles, device),
            tokens=torch.from_numpy(token).to(device),
        )


def _chunk_pieces(
    tiles: Tiles,
    least: IntArray,
    reach: int | None,
    elements_per_key: int,
    device: torch.device,
) -> Iterator[Piece]:
    """The chunk's own tokens from position ``least`` on, at most ``reach`` back from each query."""
    last = tiles.position + tiles.length  # one past the tile's last query
    first = least if reach is None else np.maximum(least, tiles.position - reach + 1)
    widest = int((last - first).max())
    # Short steps, so that a tile at the chunk's start does not meet the keys of its end.
    step = min(_step(tiles, elements_per_key), CHUNK_STEP_TOKENS)
    for low in range(0, widest, step):
        rows = np.flatnonzero(first + low < last)
        at = first[rows, None] + np.arange(low, min(low + step, widest))
        usable = at < last[rows, None]
        ahead = at - tiles.position[rows, None]
        token = np.where(usable, tiles.start[rows, None] + ahead, 0)
        query = tiles.query_position[rows, :, None]
        visible = usable[:, None] & (at[:, None] <= query)
        if reach is not None:
            visible &= at[:, None] > query - reach
        yield _piece(
            visible,
            device,
            rows=_rows(rows, tiles, device),
            tokens=torch.from_numpy(token).to(device),
        )


def _piece(
    visible: BoolArray,
    device: torch.device,
    *,
    rows: torch.Tensor | None = None,
    blocks: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
) -> Piece:
    """Make a piece from its visibility [n, 1 or TQ, K] on the host."""
    seen: BoolArray = np.any(visible, axis=1)
    hidden = None if seen.all() else torch.from_numpy(~seen[:, None, :, None]).to(device)
    mask = None if visible.all() else torch.from_numpy(visible).to(device)
    return Piece(rows, mask, hidden, blocks, offsets, tokens)


def _step(tiles: Tiles, elements_per_key: int) -> int:
    """Keys to meet at once, in tokens, so that a piece stays within ``GATHER_ELEMENTS``."""
    return max(GATHER_ELEMENTS // (elements_per_key * len(tiles.request)), 16)


def _rows(rows: IntArray, tiles: Tiles, device: torch.device) -> torch.Tensor | None:
    """The tiles ``rows`` as an index; None for all of them."""
    return None if len(rows) == len(tiles.request) else torch.from_numpy(rows).to(device)
