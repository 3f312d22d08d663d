"""How much memory each head class takes: pure arithmetic, without vLLM or torch.

Terms (see ``docs/design.md``): ``R`` retrieval and ``S`` streaming KV heads of a layer, ``P_r`` and
``P_s`` tokens per block of each class, ``D`` head size. One pool serves both classes, so a block
has the bytes of the widest group of layers; streaming layers are split into bins no wider than the
retrieval group where they can be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

DEFAULT_REFERENCE_TOKENS = 32_768
"""Request length, in tokens, at which ``plan_layout`` compares the candidates."""

MIN_STREAMING_BLOCK_TOKENS = 8
"""Smaller streaming blocks would only lengthen the tables."""


def cdiv(a: int, b: int) -> int:
    """Ceiling of ``a / b`` for non-negative integers."""
    return -(-a // b)


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
    def sink_blocks(self) -> int:
        """Blocks of the sink part, in blocks."""
        return cdiv(self.sink_size, self.block_size)

    @property
    def max_blocks(self) -> int:
        """Upper bound of a request's streaming blocks at any length.

        Worked example: sink 64, recent 256, ``P_s`` 16, no drafts: 4 + 16 = 20 blocks.
        """
        return self.sink_blocks + cdiv(self.ring_size, self.block_size)

    def blocks(self, num_tokens: int) -> int:
        """Blocks that a request of ``num_tokens`` tokens holds in one bin.

        Blocks are claimed as positions arrive, the sink's first.

        Worked example: sink 64, recent 256, ``P_s`` 16. 10 tokens: 1 block. 64 tokens: 4. 65 tokens:
        4 + 1 = 5. 320 tokens: 4 + 16 = 20. 1,000,000 tokens: 20.
        """
        sink = min(num_tokens, self.sink_size)
        ring = min(max(num_tokens - self.sink_size, 0), self.ring_size)
        return cdiv(sink, self.block_size) + cdiv(ring, self.block_size)

    def kept_tokens(self, num_tokens: int) -> int:
        """Tokens of a request of ``num_tokens`` that later queries can see, in tokens.

        Worked example: sink 64, recent 256: 100 tokens keep 100, 1,000 tokens keep 320.
        """
        return min(num_tokens, self.sink_size + self.recent_size)


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """A model's KV heads by class, per layer.

    Attributes:
        retrieval_heads: ``R`` of each layer.
        streaming_heads: ``S`` of each layer; as long as ``retrieval_heads``.
        head_size: ``D``, in elements.
        dtype_bytes: bytes of one cache element.
    """

    retrieval_heads: tuple[int, ...]
    streaming_heads: tuple[int, ...]
    head_size: int
    dtype_bytes: int

    def __post_init__(self) -> None:
        if len(self.retrieval_heads) != len(self.streaming_heads):
            raise ValueError(
                f"retrieval_heads has {len(self.retrieval_heads)} layers and streaming_heads "
                f"{len(self.streaming_heads)}: both need one entry per layer"
            )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in one KV head."""
        return 2 * self.head_size * self.dtype_bytes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Block sizes, bins and block bytes of one pool for both classes.

    Attributes:
        shape: the KV heads that are laid out.
        block_size: tokens per retrieval block (``P_r``, vLLM's ``--block-size``).
        span: what streaming heads keep, and ``P_s``.
        bins: per bin, the indices of the layers whose streaming heads share its block table.
        block_bytes: bytes of one pool block, that of the widest group.
    """

    shape: KVShape
    block_size: int
    span: StreamingSpan
    bins: tuple[tuple[int, ...], ...]
    block_bytes: int

    @property
    def has_retrieval(self) -> bool:
        """Whether any layer has a retrieval head."""
        return any(self.shape.retrieval_heads)

    def bin_of(self, layer: int) -> int:
        """Bin of a layer's streaming heads.

        Raises:
            KeyError: the layer has no streaming heads.
        """
        for index, layers in enumerate(self.bins):
            if layer in layers:
                return index
        raise KeyError(f"layer {layer} has no streaming heads")

    def blocks(self, num_tokens: int) -> int:
        """Pool blocks that a request of ``num_tokens`` tokens holds, both classes.

        Worked example: Llama-3.1-8B at 50 %, ``P_r`` = ``P_s`` = 128, one bin, sink 64, recent 256:
        32,768 tokens hold 256 retrieval blocks and 1 + 2 = 3 streaming blocks, 259 in all.
        """
        retrieval = cdiv(num_tokens, self.block_size) if self.has_retrieval else 0
        return retrieval + len(self.bins) * self.span.blocks(num_tokens)

    def held_bytes(self, num_tokens: int) -> int:
        """Bytes of the blocks that a request of ``num_tokens`` tokens holds."""
        return self.blocks(num_tokens) * self.block_bytes

    def needed_bytes(self, num_tokens: int) -> int:
        """Bytes that a request of ``num_tokens`` tokens must keep, whatever the blocks."""
        kept = self.span.kept_tokens(num_tokens)
        tokens = sum(self.shape.retrieval_heads) * num_tokens
        return (tokens + sum(self.shape.streaming_heads) * kept) * self.shape.token_bytes

    def waste(self, num_tokens: int) -> float:
        """Share of the held bytes that the rule does not need, the last block's rest excluded.

        Worked example: one layer, R = S = 1, ``P_r`` = ``P_s`` = 16, sink 16, recent 16: at 64 tokens
        4 retrieval and 2 streaming blocks are held and all of both is needed, so 0.
        """
        rounding = 0
        if self.has_retrieval:
            rest = cdiv(num_tokens, self.block_size) * self.block_size - num_tokens
            rounding = rest * sum(self.shape.retrieval_heads) * self.shape.token_bytes
        return 1.0 - self.needed_bytes(num_tokens) / (self.held_bytes(num_tokens) - rounding)

    def concurrent_requests(self, pool_bytes: int, num_tokens: int) -> float:
        """Requests of ``num_tokens`` tokens that fit a pool, vLLM's null block taken off.

        Worked example: a pool of 1,001 blocks and requests of 10 blocks: 1,000 / 10 = 100.0.
        """
        return (pool_bytes // self.block_bytes - 1) / self.blocks(num_tokens)

    def full_attention_bytes(self, num_tokens: int) -> int:
        """Bytes that stock vLLM holds for a request of ``num_tokens`` tokens, all heads paged."""
        heads = sum(self.shape.retrieval_heads) + sum(self.shape.streaming_heads)
        blocks = cdiv(num_tokens, self.block_size)
        return blocks * self.block_size * heads * self.shape.token_bytes


def pack_bins(widths: Sequence[int], capacity: int) -> tuple[tuple[int, ...], ...]:
    """Pack layers into bins by first-fit decreasing.

    Args:
        widths: width of each layer; layers of width 0 go to no bin.
        capacity: widest allowed bin; at least the widest layer.

    Returns:
        Per bin, its layer indices in ascending order.

    Worked example: widths (3, 0, 2, 1, 2) and capacity 4 give bins (0, 3) and (2, 4).
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for layer in sorted(range(len(widths)), key=lambda index: (-widths[index], index)):
        if widths[layer] == 0:
            continue
        for index, room in enumerate(free):
            if widths[layer] <= room:
                bins[index].append(layer)
                free[index] -= widths[layer]
                break
        else:
            bins.append([layer])
            free.append(capacity - widths[layer])
    return tuple(tuple(sorted(layers)) for layers in bins)


def streaming_block_sizes(block_size: int) -> Iterator[int]:
    """Candidates for ``P_s``: the divisors of ``P_r`` from 8 tokens on, largest first.

    A divisor keeps the hashes of both classes aligned.
    """
    for size in range(block_size, 0, -1):
        small = size < MIN_STREAMING_BLOCK_TOKENS and size != block_size
        if block_size % size == 0 and not small:
            yield size


def plan_layout(
    shape: KVShape,
    *,
    block_size: int,
    sink_size: int,
    recent_size: int,
    draft_size: int = 0,
    reference_tokens: int = DEFAULT_REFERENCE_TOKENS,
) -> Layout:
    """Choose ``P_s`` and the bins so that a request of ``reference_tokens`` holds the fewest bytes.

    Args:
        shape: KV heads by class.
        block_size: ``P_r``, in tokens.
        sink_size: sink tokens of the streaming heads.
        recent_size: recent tokens of the streaming heads.
        draft_size: speculative tokens that may be rolled back.
        reference_tokens: request length to compare at, in tokens.

    Returns:
        The layout with the least held bytes; among equals the one with the larger ``P_s``.
    """
    best: Layout | None = None
    for size in streaming_block_sizes(block_size):
        span = StreamingSpan(
            sink_size=sink_size, recent_size=recent_size, draft_size=draft_size, block_size=size
        )
        widths = [heads * size * shape.token_bytes for heads in shape.streaming_heads]
        retrieval = sum(shape.retrieval_heads) * block_size * shape.token_bytes
        # Without retrieval heads nothing bounds a bin: one bin, as wide as all its layers.
        capacity = max(retrieval, max(widths)) if retrieval else sum(widths)
        layout = Layout(
            shape=shape,
            block_size=block_size,
            span=span,
            bins=pack_bins(widths, capacity),
            block_bytes=capacity,
        )
        if best is None or layout.held_bytes(reference_tokens) < best.held_bytes(reference_tokens):
            best = layout
    assert best is not None, "block_size divides itself, so there is a candidate"
    return best
