"""What a streaming head keeps of a request, and the slots and blocks that it lies in."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from vllm_duo.kv_cache.rounding import cdiv

ANY_LENGTH = sys.maxsize
"""Tokens of the longest request where no length is too long: a full ring takes any."""


@dataclass(frozen=True, kw_only=True)
class StreamingSpan:
    """What a streaming head keeps, and in which blocks.

    A query at position ``i`` sees key ``j`` iff ``j <= i and (j < sink_size or j > i - recent_size)``.

    Attributes:
        sink_size: first tokens of the request that stay, in tokens (0 or more).
        recent_size: most recent tokens that stay, in tokens (1 or more).
        draft_size: speculative tokens that may be rolled back, in tokens.
        block_size: tokens per streaming block (``P_s``).
    """

    sink_size: int
    recent_size: int
    block_size: int
    draft_size: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("sink_size", 0),
            ("recent_size", 1),
            ("block_size", 1),
            ("draft_size", 0),
        ):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least} tokens, got {value}")

    @property
    def ring_size(self) -> int:
        """Slots of the ring, in tokens: the recent part and the drafts."""
        return self.recent_size + self.draft_size

    @property
    def slots(self) -> int:
        """Slots of a request's run, sink and ring, in tokens.

        Worked example: sink 64, recent 256, 4 drafts: 64 + 260 = 324 slots.
        """
        return self.sink_size + self.ring_size

    @property
    def max_blocks(self) -> int:
        """Upper bound of a request's streaming blocks in one bin at any length.

        Worked example: sink 64, recent 256, ``P_s`` 16, no drafts: 320 / 16 = 20 blocks. ``P_s`` 48:
        7 blocks (336 tokens, 16 of them never used). ``P_s`` 320: 1 block.
        """
        return cdiv(self.slots, self.block_size)

    def slot(self, position: int) -> int:
        """Slot of the run that holds the token at a position.

        Worked example: sink 64, recent 256: position 63 is in slot 63, 64 in 64, 319 in 319, and 320
        overwrites slot 64.
        """
        if position < self.sink_size:
            return position
        return self.sink_size + (position - self.sink_size) % self.ring_size

    def blocks(self, num_tokens: int) -> int:
        """Blocks that a request of ``num_tokens`` tokens holds in one bin.

        The run is cut into blocks without regard to where the sink ends, and blocks are claimed as
        positions arrive, so there are never more than ``ceil(min(n, sink) / P_s) +
        ceil(min(max(n - sink, 0), recent + drafts) / P_s)``.

        Worked example: sink 64, recent 256, ``P_s`` 16. 10 tokens: 1 block. 64 tokens: 4. 65 tokens:
        5. 320 tokens: 20. 1,000,000 tokens: 20. With ``P_s`` 128, 320 tokens: 3.
        """
        return cdiv(min(num_tokens, self.slots), self.block_size)

    def kept_tokens(self, num_tokens: int) -> int:
        """Tokens of a request of ``num_tokens`` that later queries can see, in tokens.

        Worked example: sink 64, recent 256: 100 tokens keep 100, 1,000 tokens keep 320.
        """
        return min(num_tokens, self.sink_size + self.recent_size)
