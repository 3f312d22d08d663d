"""What a pool of a layout holds: the figures of the server's start and of ``vllm-duo plan``."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_duo.kv_cache.layout import Layout
from vllm_duo.kv_cache.span import ANY_LENGTH


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """A pool of ``num_blocks`` blocks of a layout, one of which is vLLM's null block.

    Attributes:
        layout: block sizes and bins.
        num_blocks: blocks of the pool, the null block among them.
    """

    layout: Layout
    num_blocks: int

    @classmethod
    def of_bytes(cls, layout: Layout, pool_bytes: int) -> Capacity:
        """The blocks that a pool of so many bytes (of one rank) is cut into."""
        return cls(layout=layout, num_blocks=layout.num_blocks(pool_bytes))

    @property
    def usable_blocks(self) -> int:
        """Blocks that requests can hold."""
        return max(self.num_blocks - 1, 0)

    def concurrent_requests(self, num_tokens: int) -> float:
        """Requests of ``num_tokens`` (1 or more) tokens that fit at once, unrounded.

        Worked example: 1,001 blocks and requests of 8 blocks: 125.0; of 9 blocks: 111.1, so 111.
        """
        return self.usable_blocks / self.layout.blocks(num_tokens)

    def tokens_that_fit(self, num_tokens: int) -> int:
        """Tokens of all requests of ``num_tokens`` tokens that fit at once, the last one in part.

        Worked example: 1,001 blocks and requests of 1,024 tokens in 9 blocks: 1,000 * 1,024 / 9 =
        113,777 tokens.
        """
        return self.usable_blocks * num_tokens // self.layout.blocks(num_tokens)

    def longest_request(self) -> int | None:
        """Tokens of the longest request that fits; None: any length, without retrieval heads."""
        longest = self.layout.max_request_tokens(self.num_blocks)
        return None if longest == ANY_LENGTH else longest

    def times_stock(self, num_tokens: int) -> float:
        """Bytes that stock vLLM holds for a request over those held here."""
        return self.layout.times_stock(num_tokens)
