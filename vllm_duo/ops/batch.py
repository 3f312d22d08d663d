"""What every operator is told about a step: its requests, head classes and block tables.

Dimension letters: T tokens, B requests, Hq query heads, Hkv KV heads, R retrieval and S streaming KV
heads, D head size, N blocks, P tokens per block.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from vllm_duo.kv_cache.formats import CacheFormat

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
_Value = TypeVar("_Value")


class Memo:
    """Keeps what the kernels derive from it, as long as it lives itself."""

    _memo: dict[Hashable, Any]

    def memo(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """The derived value of that name, made when it is first asked for."""
        if key not in self._memo:
            self._memo[key] = make()
        value: _Value = self._memo[key]
        return value


@dataclass(frozen=True, eq=False)
class HeadMap(Memo):
    """Which KV heads of a layer belong to which class; weights and head order stay as they are.

    Attributes:
        retrieval: [R] int64, KV head indices in ascending order.
        streaming: [S] int64, KV head indices in ascending order.
    """

    retrieval: torch.Tensor
    streaming: torch.Tensor
    _memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_mask(cls, retrieval: npt.NDArray[np.bool_], device: torch.device) -> HeadMap:
        """Make a head map from a layer's mask.

        Args:
            retrieval: [Hkv] bool, True for a retrieval head.
            device: where kernels read the map.
        """
        return cls(
            torch.from_numpy(np.flatnonzero(retrieval)).to(device),
            torch.from_numpy(np.flatnonzero(~retrieval)).to(device),
        )

    @property
    def num_kv_heads(self) -> int:
        """Hkv."""
        return len(self.retrieval) + len(self.streaming)


@dataclass(frozen=True, eq=False)
class Batch(Memo):
    """The requests of one step, decodes first; what is derived of them is shared by all layers.

    A request's *context* is what the caches hold before the step; its *chunk* is what the step adds.

    Attributes:
        query_start_loc: [B + 1] int32, first query token of each request.
        seq_lens: [B] int32, tokens of each request with its chunk.
        num_decodes: requests at the front whose chunk is decoded.
        host_query_start_loc: the same on the host, for planning.
        host_seq_lens: the same on the host, for planning; on a GPU upper bounds.
        knows_prefill_lens: whether ``host_seq_lens`` are exact for the requests after the decodes.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    num_decodes: int
    host_query_start_loc: IntArray
    host_seq_lens: IntArray
    knows_prefill_lens: bool = True
    _memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_host(
        cls,
        query_start_loc: npt.ArrayLike,
        seq_lens: npt.ArrayLike,
        num_decodes: int,
        device: torch.device | None = None,
    ) -> Batch:
        """Make a batch from host lists; copies them to ``device`` (default: the CPU)."""
        start = np.asarray(query_start_loc, dtype=np.int64)
        lens = np.asarray(seq_lens, dtype=np.int64)
        return cls(
            torch.as_tensor(start, dtype=torch.int32, device=device),
            torch.as_tensor(lens, dtype=torch.int32, device=device),
            num_decodes,
            start,
            lens,
        )

    @property
    def num_reqs(self) -> int:
        """B."""
        return len(self.host_seq_lens)

    @property
    def num_tokens(self) -> int:
        """T, without padding."""
        return int(self.host_query_start_loc[-1])

    @property
    def num_decode_tokens(self) -> int:
        """Query tokens of the decodes."""
        return int(self.host_query_start_loc[self.num_decodes])

    @property
    def query_lens(self) -> IntArray:
        """[B], chunk length of each request, in tokens."""
        return np.diff(self.host_query_start_loc)

    @property
    def context_lens(self) -> IntArray:
        """[B], context length of each request, in tokens."""
        return self.host_seq_lens - self.query_lens


@dataclass(frozen=True, eq=False)
class PagedTable:
    """Block table of the retrieval heads: the token at position p lives in block p // P.

    Attributes:
        block_table: [B, width] int32; 0 is the null block, never written.
        block_size: P, in tokens.
    """

    block_table: torch.Tensor
    block_size: int


@dataclass(frozen=True, eq=False)
class SnapshotCopy:
    """Copy of a request's streaming state to or from a snapshot of it.

    Attributes:
        store: True to copy the state to the snapshot, False to restore it from there.
        row: request in the batch.
        num_tokens: the state is that of a request of so many tokens. When restored, the request's
            context; when stored, within its chunk, at its end, or up to the ring's slack before it.
        blocks: [n] int64, blocks of the snapshot in table order.
    """

    store: bool
    row: int
    num_tokens: int
    blocks: torch.Tensor


@dataclass(frozen=True, eq=False)
class RingTable:
    """Block table of the streaming heads of one bin: one run of slots, the sink's and the ring's.

    The token at position p < sink_size lives in slot p, one at p >= sink_size in slot
    sink_size + (p - sink_size) % ring_size.

    Attributes:
        block_table: [B, width] int32; 0 is the null block, never written.
        block_size: P, in tokens.
        sink_size: in tokens.
        recent_size: in tokens.
        ring_size: slots of the ring, in tokens; at least recent_size.
        copies: of the step, to be carried out in this order before its attention.
        orders: [1 + n, 4 + width] int32, on a GPU: the copies as its kernel takes them
            (``ops/snapshot/triton.py``), in a buffer that CUDA graphs keep; then ``copies`` is empty.
    """

    block_table: torch.Tensor
    block_size: int
    sink_size: int
    recent_size: int
    ring_size: int
    copies: tuple[SnapshotCopy, ...] = ()
    orders: torch.Tensor | None = None

    @property
    def slots(self) -> int:
        """Slots of a request, in tokens."""
        return self.sink_size + self.ring_size

    def table_slots(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """Table column and offset in the block of each position.

        Args:
            positions: any shape, token positions in the request.

        Returns:
            Column and offset, both of the shape of ``positions``.
        """
        ring = self.sink_size + (positions - self.sink_size) % self.ring_size
        slot = np.where(positions < self.sink_size, positions, ring)
        return slot // self.block_size, slot % self.block_size


@dataclass(frozen=True, eq=False)
class LayerCaches:
    """A layer's caches and tables; a class without heads in the layer has neither.

    Attributes:
        retrieval: [N, R, P, 2 * D], keys in the first D elements, or None where R = 0. Quantised:
            [N, R, P, ``form.row_bytes(D)``] of one byte each.
        paged: block table of ``retrieval``.
        streaming: [N, S, P, 2 * D], likewise, or None where S = 0.
        ring: block table of ``streaming``.
        form: the format of quantised caches; None: they are of the keys' dtype.
        streaming_quantised: False: ``form`` is the retrieval cache's alone, and the streaming cache is
            of the keys' dtype.
        key_scale: of the layer, where the format has no scales of its own.
        value_scale: likewise.
    """

    retrieval: torch.Tensor | None = None
    paged: PagedTable | None = None
    streaming: torch.Tensor | None = None
    ring: RingTable | None = None
    form: CacheFormat | None = None
    streaming_quantised: bool = True
    key_scale: float = 1.0
    value_scale: float = 1.0

    @property
    def streaming_form(self) -> CacheFormat | None:
        """The streaming cache's format; None: it is of the keys' dtype."""
        return self.form if self.streaming_quantised else None
