"""How much memory each head class takes: pure arithmetic, without vLLM or torch.

Terms (see ``docs/design.md``): ``R`` retrieval and ``S`` streaming KV heads
of a layer, ``P_r`` and ``P_s`` tokens per block of each class, ``D`` head size. One pool serves
both classes, so a block has the bytes of the widest group of layers. The streaming layers are split
into bins, one block table each, and ``P_s`` is what fills a block with a bin's heads.

Layers with a sliding window of the model's own stream as a whole, with no sink and the window as the
recent part. They have bins of their own, whose ``P_s`` may differ.

A layout is made of a rank's heads (``shape``) and of what a streaming head keeps (``span``); ``search``
and ``joint_search`` choose its blocks and bins, which ``packing`` fills with layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vllm_duo.kv_cache.joint_search import search_windows
from vllm_duo.kv_cache.packing import Bins
from vllm_duo.kv_cache.rounding import cdiv
from vllm_duo.kv_cache.search import search
from vllm_duo.kv_cache.shape import KVShape, check_ranks
from vllm_duo.kv_cache.span import ANY_LENGTH, StreamingSpan
from vllm_duo.windows import Windows

__all__ = ["KVShape", "Layout", "StreamingSpan", "plan_layout"]

DEFAULT_REFERENCE_TOKENS = 32_768
"""Request length, in tokens, at which ``plan_layout`` compares the candidates."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Block sizes, bins and block bytes of one pool for both classes.

    There is one scheduler and one block table for all ranks of all pipeline stages: block sizes, bins
    and block counts are those of every rank. All bytes are per rank.

    Attributes:
        ranks: the KV heads that are laid out, by rank (``KVShape.split``).
        block_size: tokens per retrieval block (``P_r``, vLLM's ``--block-size``).
        span: what the pattern's streaming heads keep, and ``P_s``.
        bins: per bin, the indices of the layers whose streaming heads share its block table.
        block_bytes: bytes of one pool block, that of the widest group on any rank.
        windows: per layer its own sliding window, in tokens, or None; empty: no layer has one.
        bin_spans: with ``windows``, what each bin's heads keep, and its ``P_s``; empty: ``span``.
    """

    ranks: tuple[KVShape, ...]
    block_size: int
    span: StreamingSpan
    bins: Bins
    block_bytes: int
    windows: Windows = ()
    bin_spans: tuple[StreamingSpan, ...] = ()

    @property
    def shape(self) -> KVShape:
        """The KV heads, where there is only one rank.

        Raises:
            ValueError: there are several ranks.
        """
        if len(self.ranks) != 1:
            raise ValueError(
                f"the layout has {len(self.ranks)} ranks, expected one: name it (layout.ranks[rank])"
            )
        return self.ranks[0]

    @cached_property
    def has_retrieval(self) -> bool:
        """Whether there are paged blocks: any rank has a retrieval head, or a draft model."""
        return any(rank.paged_token_bytes for rank in self.ranks)

    @property
    def num_groups(self) -> int:
        """KV cache groups: that of the retrieval heads, if there are any, and the bins."""
        return self.has_retrieval + len(self.bins)

    def bin_of(self, layer: int) -> int:
        """Bin of a layer's streaming heads.

        Raises:
            KeyError: the layer has no streaming heads on any rank.
        """
        for index, layers in enumerate(self.bins):
            if layer in layers:
                return index
        raise KeyError(f"layer {layer} has no streaming heads")

    def span_of(self, index: int) -> StreamingSpan:
        """What the heads of a bin keep, and in which blocks."""
        return self.bin_spans[index] if self.bin_spans else self.span

    @cached_property
    def spans(self) -> tuple[StreamingSpan, ...]:
        """``span_of`` each bin."""
        return self.bin_spans or (self.span,) * len(self.bins)

    def streaming_blocks(self, num_tokens: int) -> int:
        """Streaming blocks that a request of ``num_tokens`` tokens holds in all bins.

        Worked example: a bin with sink 64 and recent 256 in blocks of 128 tokens, and one of a model's
        own window of 1,024 tokens in blocks of 100: 3 + 11 = 14 blocks from 1,001 tokens on.
        """
        if not self.bin_spans:
            return len(self.bins) * self.span.blocks(num_tokens)
        return sum(span.blocks(num_tokens) for span in self.bin_spans)

    @cached_property
    def most_slots(self) -> int:
        """Slots of the longest run of any bin, in tokens: beyond them no bin grows."""
        return max((span.slots for span in self.bin_spans), default=self.span.slots)

    def blocks(self, num_tokens: int) -> int:
        """Pool blocks that a request of ``num_tokens`` tokens holds, both classes.

        Worked example: Llama-3.1-8B at 50 %, ``P_r`` = ``P_s`` = 128, one bin, sink 64, recent 256:
        32,768 tokens hold 256 retrieval blocks and ceil(320 / 128) = 3 streaming blocks, 259 in all.
        """
        retrieval = cdiv(num_tokens, self.block_size) if self.has_retrieval else 0
        return retrieval + self.streaming_blocks(num_tokens)

    def held_bytes(self, num_tokens: int) -> int:
        """Bytes of the blocks that a request of ``num_tokens`` tokens holds."""
        return self.blocks(num_tokens) * self.block_bytes

    def needed_bytes(self, num_tokens: int) -> int:
        """Bytes that a request of ``num_tokens`` tokens must keep, whatever the blocks.

        With several ranks, of the rank that must keep most.

        Worked example: R = 3 and S = 5 heads in all, sink 64, recent 256, D = 128, 2 bytes: 1,000
        tokens are (3 * 1,000 + 5 * 320) * 512 bytes = 2,355,200 bytes. With four bits in the retrieval
        heads alone 3 * 1,000 * 136 + 5 * 320 * 512 = 1,227,200 bytes.
        """
        return self._needed_bytes(self.neediest_rank(num_tokens), num_tokens)

    def neediest_rank(self, num_tokens: int) -> KVShape:
        """The rank that must keep most of a request of ``num_tokens`` tokens, the first of equals."""
        return max(self.ranks, key=lambda rank: self._needed_bytes(rank, num_tokens))

    def waste(self, num_tokens: int) -> float:
        """Share of the held bytes that the rule does not need, the last block's rest excluded.

        Excluded are the tokens that a growing request has yet to write: the rest of the last
        retrieval block, and the rest of each bin's last streaming block while the run still grows
        (fewer than ``slots`` tokens). Counted are blocks wider than their group, the rest of a full
        run's last block, slots for drafts, and, with several ranks, whatever is held beyond the
        needs of the rank that needs most.

        Worked examples, one layer with R = S = 1, ``P_r`` = ``P_s`` = 16, sink 16, recent 16. 64
        tokens: 4 retrieval and 2 streaming blocks, all of both needed, so 0. 65 tokens: 15 tokens'
        rest of the fifth retrieval block is excluded, so 0. Sink 16, recent 24: 40 of 48 slots are
        needed, so 8 / (64 + 48) = 7.1 % at 64 tokens; at 33 tokens the run still grows, so 0.
        """
        return self.pool_waste([num_tokens])

    def pool_waste(self, lengths: Sequence[int]) -> float:
        """``waste`` of several requests together: of what they hold, the share that is not needed.

        Args:
            lengths: tokens of each request; without any the waste is 0.

        Worked example, the layer above with sink 16, recent 24: a request of 64 tokens holds 7 blocks
        and needs all but 8 of their 112 slots; one of 33 tokens holds 6, and the 15 + 15 slots that
        it does not need are those that its next tokens go to: 8 / (112 + 96 - 30) = 4.5 %.
        """
        needed = [
            sum(self._needed_bytes(rank, num_tokens) for num_tokens in lengths)
            for rank in self.ranks
        ]
        most = max(needed)
        if most == 0:
            return 0.0
        rank = self.ranks[needed.index(most)]
        rounding = sum(self._growing_bytes(rank, num_tokens) for num_tokens in lengths)
        held = sum(map(self.held_bytes, lengths)) - rounding
        return 1.0 - most / held

    def _growing_bytes(self, rank: KVShape, num_tokens: int) -> int:
        """Bytes, over all heads, that the request's next tokens go to."""
        if num_tokens == 0:
            return 0
        growing = 0
        if self.has_retrieval:
            rest = cdiv(num_tokens, self.block_size) * self.block_size - num_tokens
            growing += rest * rank.paged_token_bytes
        for span, token_bytes in self._runs(rank):
            if num_tokens < span.slots:
                rest = span.blocks(num_tokens) * span.block_size - num_tokens
                growing += rest * token_bytes
        return growing

    def _runs(self, rank: KVShape) -> tuple[tuple[StreamingSpan, int], ...]:
        """Each kind of run, and the bytes of a token in a rank's streaming heads that have it."""
        if not self.bin_spans:
            return ((self.span, rank.ring_token_bytes),)
        return self._runs_by_rank[rank]

    @cached_property
    def _runs_by_rank(self) -> dict[KVShape, tuple[tuple[StreamingSpan, int], ...]]:
        runs = {}
        for rank in self.ranks:
            token_bytes = dict.fromkeys(self.bin_spans, 0)
            for layers, span in zip(self.bins, self.bin_spans, strict=True):
                token_bytes[span] += sum(map(rank.ring_layer_bytes, layers))
            runs[rank] = tuple(token_bytes.items())
        return runs

    def num_blocks(self, pool_bytes: int) -> int:
        """Blocks of a pool, vLLM's null block among them.

        Worked example: 10,500 bytes in blocks of 1,000 bytes: 10 blocks.
        """
        return pool_bytes // self.block_bytes

    def max_request_tokens(self, num_blocks: int) -> int:
        """Tokens of the longest request that fits ``num_blocks`` blocks, the null block taken off.

        Without retrieval heads a request that fits at ``slots`` tokens fits at any length:
        ``ANY_LENGTH``.

        Worked example: R = S = 1, ``P_r`` = ``P_s`` = 16, sink 16, recent 16, 7 blocks. One is
        vLLM's; 6 hold 2 streaming and 4 retrieval blocks, so 64 tokens.
        """
        usable = num_blocks - 1
        if not self.has_retrieval and self.blocks(self.most_slots) <= usable:
            return ANY_LENGTH
        fits, too_long = 0, max(usable, 0) * self.block_size + self.most_slots + 1
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            if self.blocks(middle) <= usable:
                fits = middle
            else:
                too_long = middle
        return fits

    @cached_property
    def full_attention(self) -> Layout:
        """What stock vLLM makes of the same heads: all of them paged, in blocks of ``P_r`` tokens.

        All of them are quantised if the retrieval heads are.
        A draft model's heads are paged either way. Layers with a sliding window of their own keep that
        window and no more, in the best layout there is for it: what the window saves is the model's
        merit, not duo's. (Stock vLLM itself holds more: while it computes a prompt, a chunk as well.)

        Worked example: ``layout.full_attention.max_request_tokens(num_blocks)`` is stock's longest
        request in as many blocks of its own size.
        """
        slides = [window is not None for window in self.windows]
        slides = slides or [False] * len(self.ranks[0].streaming_heads)
        ranks = tuple(rank.paged(slides) for rank in self.ranks)
        if any(slides):
            return plan_layout(
                ranks,
                block_size=self.block_size,
                sink_size=self.span.sink_size,
                recent_size=self.span.recent_size,
                draft_size=self.span.draft_size,
                windows=self.windows,
            )
        return Layout(
            ranks=ranks,
            block_size=self.block_size,
            span=self.span,
            bins=(),
            block_bytes=max(rank.paged_token_bytes for rank in ranks) * self.block_size,
        )

    def full_attention_bytes(self, num_tokens: int) -> int:
        """Bytes that stock vLLM holds for a request of ``num_tokens`` tokens, all heads paged."""
        return self.full_attention.held_bytes(num_tokens)

    def times_stock(self, num_tokens: int) -> float:
        """Bytes that stock vLLM holds for a request over those held here."""
        return self.full_attention_bytes(num_tokens) / self.held_bytes(num_tokens)

    def constant_bytes(self, rank: KVShape) -> int:
        """Bytes that a request must keep however long it is: the streaming heads' tokens.

        Worked example: S = 5 heads in all, sink 64, recent 256, D = 128, 2 bytes: 5 * 320 * 512 =
        819,200 bytes.
        """
        return sum(
            (span.sink_size + span.recent_size) * token_bytes
            for span, token_bytes in self._runs(rank)
        )

    def _needed_bytes(self, rank: KVShape, num_tokens: int) -> int:
        kept = sum(
            span.kept_tokens(num_tokens) * token_bytes for span, token_bytes in self._runs(rank)
        )
        return rank.paged_token_bytes * num_tokens + kept


def plan_layout(
    shape: KVShape | Sequence[KVShape],
    *,
    block_size: int,
    sink_size: int,
    recent_size: int,
    draft_size: int = 0,
    windows: Sequence[int | None] = (),
    reference_tokens: int = DEFAULT_REFERENCE_TOKENS,
) -> Layout:
    """Choose ``P_s`` and the bins so that a request holds few bytes in few bins.

    First come the layouts with which a request of any length holds at most what stock vLLM would
    and one block a group. Where no layout does, all are taken. A sufficient condition for one is
    that with ``P_s = R * P_r // S`` (heads of all layers) ``P_s * (P_s + 1) >= slots - 1``: then one
    bin does, for 320 slots from ``P_s`` 18 on. None exists, say, for S = 8 heads in the only layer,
    R = 1 and ``P_r`` = 1: a block then holds one token, of either class. Ranks with unequal numbers
    of heads of a class cannot be promised it and do without. Of those within ``HELD_TOLERANCE`` of
    the least bytes at ``reference_tokens``, that with the fewest bins is chosen, then with the
    least bytes, then with the largest ``P_s``. Where layers have windows of their own, every bin's
    heads keep the same, ``P_s`` is chosen for each kind of bin, and stock stands for all heads paged.
    Where streaming heads keep the model's dtype beside quantised retrieval heads, short requests hold
    more than stock's, which quantises all: all layouts are taken.

    Args:
        shape: KV heads by class; of each rank (``KVShape.split``) where there are several.
        block_size: ``P_r``, in tokens.
        sink_size: sink tokens of the streaming heads.
        recent_size: recent tokens of the streaming heads.
        draft_size: speculative tokens that may be rolled back.
        windows: per layer its own sliding window, in tokens, or None; all heads of a layer with one
            are among ``streaming_heads``. Empty: no layer has one.
        reference_tokens: request length to compare at, in tokens: pass max-model-len if that is
            shorter.

    Raises:
        ValueError: no heads at all, no ranks, ranks of different models, an impossible size, or a
            layer with a window and retrieval heads.

    Worked example: R = 64 and S = 192 heads, 16 tokens a block, sink 64, recent 256. A block is
    64 * 16 = 1,024 tokens of a head and the run 192 * 320 = 60 blocks' worth. One bin has
    ``P_s`` = 1,024 // 192 = 5 and 64 blocks a run, so that 320 tokens would hold 20 + 64 blocks,
    two more than stock's 80 and one a group. Three bins of 64 heads have ``P_s`` = 16 and 20 blocks
    each, 60 in all.

    With four bits in the retrieval heads alone, D 128 and bfloat16: R = S = 128, ``P_r`` 128. A block
    is 128 * 128 * 136 bytes, and 34 tokens of 128 heads of 512 bytes fill it: 320 are 10 blocks.
    """
    ranks = (shape,) if isinstance(shape, KVShape) else tuple(shape)
    check_ranks(ranks)
    span = StreamingSpan(
        sink_size=sink_size, recent_size=recent_size, draft_size=draft_size, block_size=1
    )
    if block_size < 1 or reference_tokens < 1:
        raise ValueError(
            f"expected a block_size and reference_tokens of at least 1 token, got {block_size} and "
            f"{reference_tokens}"
        )
    windows = tuple(windows)
    if any(window is not None for window in windows):
        _check_windows(ranks, windows)
        choice = search_windows(ranks, block_size, span, windows, reference_tokens)
    else:
        windows = ()
        choice = search(ranks, block_size, span, reference_tokens)
    return Layout(
        ranks=ranks,
        block_size=block_size,
        span=choice.span,
        bins=choice.bins,
        block_bytes=choice.block_bytes,
        windows=windows,
        bin_spans=choice.bin_spans,
    )


def _check_windows(ranks: tuple[KVShape, ...], windows: Windows) -> None:
    num_layers = len(ranks[0].streaming_heads)
    if len(windows) != num_layers:
        raise ValueError(
            f"windows: expected one entry for each of {num_layers} layers, got {len(windows)}"
        )
    both = [
        layer
        for layer, window in enumerate(windows)
        if window is not None and any(rank.retrieval_heads[layer] for rank in ranks)
    ]
    if both:
        raise ValueError(
            f"layers {both} have a sliding window of their own and retrieval heads: expected that all "
            "of their heads stream"
        )
