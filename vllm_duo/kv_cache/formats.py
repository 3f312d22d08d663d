"""How quantised KV caches keep numbers: names, bytes and scales, without vLLM or torch.

A token's keys and values in one head are one row: ``D`` key numbers, ``D`` value numbers and, where the
scales are the token's and head's own, two float32 scales. What the numbers mean is in ``ops/quantise``,
and in ``csrc/kernels/quantise.h`` for the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

BITS = {"e4m3": 8, "e5m2": 8, "int8": 8, "int4": 4}
GREATEST = {"e4m3": 448.0, "e5m2": 57344.0, "int8": 127.0, "int4": 7.0}


@dataclass(frozen=True, kw_only=True)
class CacheFormat:
    """One quantised format.

    Attributes:
        number: float8 with 4 or 5 bits of exponent (OCP's E4M3 and E5M2), or a signed integer.
        token_scales: a scale of each token's keys and values in each head, chosen as they are written;
            else one of the layer's keys and one of its values, from the checkpoint or 1.
    """

    number: Literal["e4m3", "e5m2", "int8", "int4"]
    token_scales: bool

    @property
    def scale_bytes(self) -> int:
        """Bytes of a token's scales in one head."""
        return 8 if self.token_scales else 0

    @property
    def greatest(self) -> float:
        """The greatest number; greater ones become this."""
        return GREATEST[self.number]

    def number_bytes(self, head_size: int) -> int:
        """Bytes of a token's keys, or of its values, in one head.

        Worked example: 128 numbers are 128 bytes, of four bits 64.
        """
        return head_size * BITS[self.number] // 8

    def row_bytes(self, head_size: int) -> int:
        """Bytes of a token's keys, values and scales in one head of ``head_size`` elements.

        Worked example: head size 128: 256 bytes with a layer's scales, 264 with a token's own, 136 with
        four bits; a bfloat16 cache has 512.
        """
        return 2 * self.number_bytes(head_size) + self.scale_bytes


_E4M3 = CacheFormat(number="e4m3", token_scales=False)

FORMATS = {
    "fp8": _E4M3,
    "fp8_e4m3": _E4M3,
    "fp8_e5m2": CacheFormat(number="e5m2", token_scales=False),
    "fp8_per_token_head": CacheFormat(number="e4m3", token_scales=True),
    "int8_per_token_head": CacheFormat(number="int8", token_scales=True),
    "int4_per_token_head": CacheFormat(number="int4", token_scales=True),
}
"""By vLLM's ``--kv-cache-dtype``."""


def row_bytes(kv_cache_dtype: str, head_size: int) -> int | None:
    """``CacheFormat.row_bytes`` by vLLM's ``--kv-cache-dtype``; None: the cache is not quantised."""
    form = FORMATS.get(kv_cache_dtype)
    return None if form is None else form.row_bytes(head_size)
