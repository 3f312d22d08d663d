"""Block claims of the streaming heads: a ring per request, claimed as positions arrive.

The allocator knows vLLM's block pool only through ``Pool``, so it is tested without an engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Protocol

from vllm_duo.kv_cache.span import ANY_LENGTH, StreamingSpan


class Block(Protocol):
    """What the allocator needs to know of a pool block."""

    block_id: int
    is_null: bool
    ref_cnt: int


class Pool(Protocol):
    """What the allocator needs of vLLM's ``BlockPool``."""

    def get_new_blocks(self, num_blocks: int) -> Sequence[Block]:
        """Take ``num_blocks`` free blocks; raises where there are not enough."""

    def free_blocks(self, ordered_blocks: Iterable[Block]) -> None:
        """Give blocks back."""


class RingAllocator:
    """Claims the sink and ring blocks of each request and overwrites them in place.

    A table is one run of slots: the token at position ``p < sink_size`` lives in slot ``p``, a later
    one in slot ``sink_size + (p - sink_size) % ring_size``. Tables only grow, to ``span.max_blocks``
    at most, so a request costs the same from then on, at any length.

    Args:
        span: what a streaming head keeps.
        pool: where blocks come from.
    """

    def __init__(self, span: StreamingSpan, pool: Pool) -> None:
        self.span = span
        self.pool = pool
        self.tables: defaultdict[str, list[Block]] = defaultdict(list)
        self._max_blocks = span.max_blocks
        self._held = 0

    def missing_blocks(self, request_id: str, num_tokens: int) -> int:
        """Blocks that ``claim`` would take for a request of ``num_tokens`` tokens.

        Worked example: sink 4, recent 8, 4 tokens per block. A new request of 6 tokens misses
        1 + 1 = 2 blocks; the same at 13 tokens, holding 2, misses 1; at 1,000 tokens, holding 3, 0.
        """
        held = len(self.tables.get(request_id, ()))
        if held == self._max_blocks:
            return 0
        return max(self.span.blocks(num_tokens) - held, 0)

    def room(self, request_id: str) -> int:
        """Tokens up to which a request misses no blocks.

        Worked example: sink 4, recent 8, 4 tokens per block: 8 tokens with 2 blocks, any number with
        3, and 0 for a request without blocks.
        """
        held = len(self.tables.get(request_id, ()))
        return ANY_LENGTH if held == self._max_blocks else held * self.span.block_size

    def claim(self, request_id: str, num_tokens: int) -> list[Block]:
        """Take the blocks that a request of ``num_tokens`` tokens misses.

        Returns:
            The new blocks, in table order; empty once the ring is whole.
        """
        missing = self.missing_blocks(request_id, num_tokens)
        if missing == 0:
            return []
        new = list(self.pool.get_new_blocks(missing))
        self.tables[request_id].extend(new)
        self._held += missing
        return new

    def adopt(self, request_id: str, blocks: Sequence[Block]) -> None:
        """Start a new request's table with blocks that the caller already owns."""
        table = self.tables[request_id]
        assert not table, "only a new request adopts blocks"
        table.extend(blocks)
        self._held += len(blocks)

    def pop(self, request_id: str) -> list[Block]:
        """Forget a request and return its blocks, still owned by the caller."""
        table = self.tables.pop(request_id, [])
        self._held -= len(table)
        return table

    def growing_blocks(self) -> int:
        """Blocks that the tables may still grow by, together."""
        return len(self.tables) * self._max_blocks - self.held_blocks()

    def held_blocks(self) -> int:
        """Blocks held by all requests together."""
        return self._held

    def check_integrity(self) -> None:
        """Check the ring's invariants.

        Raises:
            RuntimeError: a table is longer than the formula allows, names the null block, a free
                block or a block twice, or the count of held blocks is wrong.
        """
        if self._held != sum(map(len, self.tables.values())):
            raise RuntimeError(f"the tables do not hold {self._held} streaming blocks")
        seen: set[int] = set()
        for request_id, table in self.tables.items():
            if len(table) > self.span.max_blocks:
                raise RuntimeError(
                    f"request {request_id} holds {len(table)} streaming blocks, at most "
                    f"{self.span.max_blocks} are allowed"
                )
            for block in table:
                if block.is_null or block.ref_cnt < 1 or block.block_id in seen:
                    raise RuntimeError(
                        f"streaming block {block.block_id} of request {request_id} is "
                        + ("null" if block.is_null else "free" if block.ref_cnt < 1 else "shared")
                    )
                seen.add(block.block_id)
