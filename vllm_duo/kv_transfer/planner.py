"""The scheduler's side: which prefix of a prompt is stored, and what of a step is to be stored.

A hit is promised only once its files were read whole and checked: vLLM cannot take a promise back
from a request whose streaming state did not arrive. So they are read here, and the worker merely
copies.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.core.kv_cache_utils import resolve_block_hashes

from vllm_duo.kv_cache.snapshots import find_snapshot
from vllm_duo.kv_transfer.orders import Load, Save
from vllm_duo.kv_transfer.pool_shape import GroupShape, PoolShape
from vllm_duo.kv_transfer.store import Key, Kind, Store

if TYPE_CHECKING:
    import numpy.typing as npt
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.request import Request

AGE_STEP_NS = 1000
"""A page counts as used so much earlier than the one before it: a prefix is evicted from its end."""


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """What is stored for a request beyond what the pool has.

    Attributes:
        asked: request, its tokens, and how many of them the pool has; it is read once for these.
        num_tokens: end of the stored prefix; that of the pool's hit where nothing is stored.
        pages: [pages beyond the pool's hit, width] uint8; None without retrieval heads.
        rings: per bin [blocks, width] uint8.
        keys: the files, and the number of pages before the end of what each stands for.
    """

    asked: tuple[str, int, int]
    num_tokens: int
    pages: npt.NDArray[np.uint8] | None = None
    rings: tuple[npt.NDArray[np.uint8], ...] = ()
    keys: tuple[tuple[Key, int], ...] = ()


class Planner:
    """Finds stored prefixes and says what to store.

    Args:
        store: the files.
        shape: of the pool.
    """

    def __init__(self, store: Store, shape: PoolShape) -> None:
        self.store = store
        self.shape = shape
        self.manager: KVCacheManager | None = None
        self._found: _Found | None = None
        # By request: how many of its first pages are stored, or were handed to the worker.
        self._stored: dict[str, int] = {}

    def match(self, request: Request, num_local: int) -> int:
        """Tokens that can be loaded beyond those that the pool has; their files have been read.

        Args:
            request: about to be admitted.
            num_local: tokens that the pool has, of whole pages.
        """
        if request.skip_reading_prefix_cache or not _is_text(request):
            return 0
        asked = (request.request_id, request.num_tokens, num_local)
        if self._found is None or self._found.asked != asked:
            self._found = self._search(request, asked)
        return self._found.num_tokens - num_local

    def _hashes(self, request: Request) -> Sequence[bytes]:
        assert self.manager is not None
        size = self.manager.block_pool.hash_block_size
        hashes: Sequence[bytes] = resolve_block_hashes(
            request.block_hashes, size, self.shape.page_tokens
        )
        return hashes

    def _search(self, request: Request, asked: tuple[str, int, int]) -> _Found:
        size = self.shape.page_tokens
        hashes, first = self._hashes(request), asked[2] // size
        # The last token is always computed: its logits are asked for.
        longest = min((request.num_tokens - 1) // size, len(hashes))
        while True:
            end = self._reach(hashes, first, longest)
            if end == first:
                return _Found(asked, asked[2])
            found = self._read(hashes, first, end, asked)
            if found is not None:
                return found
            # A file that could not be read is not there any more, or known to be damaged.

    def _reach(self, hashes: Sequence[bytes], first: int, longest: int) -> int:
        """The longest prefix with all its files, in pages; ``first`` if there is none."""
        end = longest
        if self.shape.pages is not None:
            has = (self.store.has(Key(Kind.PAGE, hashes[page])) for page in range(first, longest))
            end = first + next((index for index, there in enumerate(has) if not there), end - first)
        if self.shape.rings:
            ends = range(end, first, -1)
            has = (self.store.has(Key(Kind.RING, hashes[end - 1])) for end in ends)
            end = next((end for end, there in zip(ends, has, strict=True) if there), first)
        return end

    def _read(
        self, hashes: Sequence[bytes], first: int, end: int, asked: tuple[str, int, int]
    ) -> _Found | None:
        """Read the files of a prefix; None if one of them cannot be trusted."""
        num_tokens, keys = end * self.shape.page_tokens, []
        pages, rings = None, []
        if self.shape.rings:
            key = Key(Kind.RING, hashes[end - 1])
            data = np.empty(self.shape.ring_bytes(num_tokens), dtype=np.uint8)
            if not self.store.read(key, data.data):
                return None
            keys.append((key, end))
            for ring in self.shape.rings:
                blocks = ring.ring_blocks(num_tokens)
                own, data = np.split(data, [blocks * ring.width])
                rings.append(own.reshape(blocks, ring.width))
        if self.shape.pages is not None:
            pages = np.empty((end - first, self.shape.pages.width), dtype=np.uint8)
            whole = True
            for page, row in enumerate(pages, first):
                key = Key(Kind.PAGE, hashes[page])
                # Past a damaged one, too: all that are shall be known, to be stored anew.
                whole = self.store.read(key, row.data) and whole
                keys.append((key, page))
            if not whole:
                return None
        return _Found(asked, num_tokens, pages, tuple(rings), tuple(keys))

    def allocated(self, request: Request, blocks: KVCacheBlocks, num_external: int) -> list[Load]:
        """The copies that fill a request's blocks with what was found.

        Args:
            request: just admitted.
            blocks: all that it holds.
            num_external: tokens that vLLM takes from here.

        Raises:
            RuntimeError: it is not what ``match`` has read.
        """
        found, self._found = self._found, None
        if num_external == 0:
            return []
        if found is None or found.asked[0] != request.request_id:
            raise RuntimeError(
                f"request {request.request_id} was to load {num_external} tokens that were not "
                "read; this is a defect of vllm-duo, please report it with the server's flags"
            )
        num_local, ids = found.asked[2], blocks.get_block_ids()
        assert found.num_tokens == num_local + num_external
        size, loads = self.shape.page_tokens, []
        if self.shape.pages is not None:
            assert found.pages is not None
            table = ids[self.shape.pages.group_id]
            own = table[num_local // size : found.num_tokens // size]
            loads.append(Load(tuple(own), found.pages))
        for ring, data in zip(self.shape.rings, found.rings, strict=True):
            loads.append(Load(tuple(ids[ring.group_id][: len(data)]), data))
        now = time.time_ns()
        for key, page in found.keys:
            self.store.touch(key, now - page * AGE_STEP_NS)
        return loads

    def boundaries(self, requests: Iterable[Request]) -> list[tuple[Request, int]]:
        """Where prompts are worth storing after a step if no head streams: at their last whole page."""
        size = self.shape.page_tokens
        ends = (
            (request, min(request.num_computed_tokens, request.num_prompt_tokens) // size * size)
            for request in requests
        )
        return [
            (request, end)
            for request, end in ends
            if end // size > self._stored.get(request.request_id, 0)
        ]

    def saves(self, boundaries: Iterable[tuple[Request, int]]) -> list[Save]:
        """The files that a planned step makes possible.

        Args:
            boundaries: requests of the step, and tokens of them that are computed after it, of whole
                pages. Where heads stream, the pool has a snapshot of them there.
        """
        saves: list[Save] = []
        for request, num_tokens in boundaries:
            # Snapshots of answers are many and short-lived; the next turn finds the prompt.
            if num_tokens <= request.num_prompt_tokens and _is_text(request):
                saves += self._save(request, num_tokens)
        return saves

    def _save(self, request: Request, num_tokens: int) -> list[Save]:
        assert self.manager is not None
        hashes, end = self._hashes(request), num_tokens // self.shape.page_tokens
        saves, now = [], time.time_ns()
        rings = [self._snapshot(ring, hashes[end - 1], num_tokens) for ring in self.shape.rings]
        if None in rings:
            return []
        if self.shape.pages is not None:
            width = self.shape.pages.width
            table = self.manager.get_block_ids(request.request_id)[self.shape.pages.group_id]
            for page in range(self._stored.get(request.request_id, 0), end):
                block = ((table[page],), width)
                saves += self._missing(Key(Kind.PAGE, hashes[page]), (block,), now, page)
            self._stored[request.request_id] = end
        if rings:
            blocks = tuple(ring for ring in rings if ring is not None)
            saves += self._missing(Key(Kind.RING, hashes[end - 1]), blocks, now, end)
        return saves

    def _snapshot(
        self, ring: GroupShape, prefix: Any, num_tokens: int
    ) -> tuple[tuple[int, ...], int] | None:
        """The pool's snapshot in one bin and the bytes of a block; None if it is not whole."""
        assert self.manager is not None
        pool, size = self.manager.block_pool, ring.ring_blocks(num_tokens)
        blocks = find_snapshot(pool, prefix, size, ring.group_id)
        return None if blocks is None else (tuple(block.block_id for block in blocks), ring.width)

    def _missing(
        self, key: Key, blocks: tuple[tuple[tuple[int, ...], int], ...], now: int, page: int
    ) -> list[Save]:
        when = now - page * AGE_STEP_NS
        if self.store.touch(key, when):
            return []
        damaged = key in self.store.damaged
        self.store.damaged.discard(key)
        return [Save(key, blocks, when, damaged)]

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        self._stored.pop(request_id, None)
        if self._found is not None and self._found.asked[0] == request_id:
            self._found = None

    def reset(self) -> None:
        """Remove what is stored; what the worker is about to write may still come."""
        self._found = None
        self._stored.clear()
        self.store.clear()


def _is_text(request: Request) -> bool:
    """Whether the prefix's hash stands for all that its keys and values depend on, for ever.

    An adapter's hash has its name and path but not its weights; those of images and embeddings have
    names that may be the client's.
    """
    return (
        request.lora_request is None
        and not request.mm_features
        and request.prompt_embeds is None
        and request.pooling_params is None
    )
