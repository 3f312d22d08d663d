"""How much memory each head class takes: pure arithmetic, without vLLM or torch.

Terms (see ``docs/design.md``): ``R`` retrieval and ``S`` streaming KV heads
of a layer, ``P_r`` and ``P_s`` tokens per block of each class, ``D`` head size. One pool serves
both classes, so a block has the bytes of the widest group of layers. The streaming layers are split
into bins, one block table each, and ``P_s`` is what fills a block with a bin's heads.

Layers with a sliding window of the model's own stream as a whole, with no sink and the window as the
recent part. They have bins of their own, whose ``P_s`` may differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

from vllm_duo.kv_cache.joint_search import Kind, Pool, search
from vllm_duo.kv_cache.packing import Bins, least_capacity, spread_ranks
from vllm_duo.kv_cache.ranks import own_heads, split_problem
from vllm_duo.windows import Windows

DEFAULT_REFERENCE_TOKENS = 32_768
"""Request length, in tokens, at which ``plan_layout`` compares the candidates."""

HELD_TOLERANCE = 0.0025
"""Held bytes at the reference length that one bin less may cost, as a share.

Streaming bytes do not grow with the request, so a share of 0.25 % at 32,768 tokens is at most 2 %
at 4,096: the waste there stays within its 3 % with room for the rounding to whole blocks.
"""

WINDOW_TOLERANCE = 0.01
"""The same for models with sliding-window layers of their own: they have more bins to begin with, each
costs time in every step, and a window is a large part of what a request of theirs holds."""

MAX_BINS = 16
"""Most bins of a layout. Each is a KV cache group that the scheduler and the workers walk through
in every step; only patterns with hardly any retrieval heads would fill more."""

MAX_GROUPS = 1 + MAX_BINS
"""Most KV cache groups: that of the retrieval heads and the bins."""

ANY_LENGTH = sys.maxsize
"""Tokens of the longest request where no length is too long: without retrieval heads."""


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


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """The KV heads of one rank by class, per layer; none in the layers of other pipeline stages.

    Attributes:
        retrieval_heads: ``R`` of each layer.
        streaming_heads: ``S`` of each layer; as long as ``retrieval_heads``.
        head_size: ``D``, in elements.
        dtype_bytes: bytes of one cache element.
        row_bytes: bytes of one token in one KV head of a quantised cache (``CacheFormat.row_bytes``).
        draft_token_bytes: bytes of one token in all layers of a draft model, whose heads keep every
            token and may have another size; they lie in the retrieval heads' blocks.
    """

    retrieval_heads: tuple[int, ...]
    streaming_heads: tuple[int, ...]
    head_size: int
    dtype_bytes: int
    row_bytes: int | None = None
    draft_token_bytes: int = 0

    def __post_init__(self) -> None:
        if len(self.retrieval_heads) != len(self.streaming_heads):
            raise ValueError(
                f"retrieval_heads has {len(self.retrieval_heads)} layers and streaming_heads "
                f"{len(self.streaming_heads)}: both need one entry per layer"
            )

    @classmethod
    def split(
        cls,
        retrieval: Iterable[Iterable[bool]],
        *,
        head_size: int,
        dtype_bytes: int,
        row_bytes: int | None = None,
        tensor_parallel_size: int = 1,
        draft_token_bytes: int = 0,
        stage_sizes: Sequence[int] | None = None,
    ) -> tuple[KVShape, ...]:
        """The shape of every rank, with the heads where vLLM puts them (``ranks.own_heads``).

        Ranks are numbered as vLLM's workers: all of the first pipeline stage, then of the next.

        Args:
            retrieval: [L, Hkv], true for a retrieval head (``HeadSelection.retrieval``).
            head_size: ``D``, in elements.
            dtype_bytes: bytes of one cache element.
            row_bytes: bytes of one token in one KV head of a quantised cache.
            tensor_parallel_size: ranks of a stage.
            stage_sizes: layers of each pipeline stage (``ranks.stage_sizes``); None: one stage.
            draft_token_bytes: bytes of one token in a draft model's layers on each rank.

        Raises:
            ValueError: layers of unequal width, neither of ranks and heads divides the other, or
                stages that do not have all layers.

        Worked example: a layer (1, 0, 0, 0) on two ranks: R = 1, S = 1 and R = 0, S = 2. On eight
        ranks: the first two have R = 1, the other six S = 1. Two such layers in two stages of one
        rank: R = (1, 0), S = (3, 0) and R = (0, 1), S = (0, 3).
        """
        mask = [[bool(head) for head in layer] for layer in retrieval]
        sizes = sorted({len(layer) for layer in mask})
        if len(sizes) != 1:
            raise ValueError(
                f"retrieval mask: expected as many KV heads in every layer, got {sizes}: pass one "
                "flag per KV head"
            )
        if problem := split_problem(sizes[0], tensor_parallel_size):
            raise ValueError(problem)
        stages = (len(mask),) if stage_sizes is None else tuple(stage_sizes)
        if sum(stages) != len(mask):
            raise ValueError(
                f"stages of {stages} layers: expected {len(mask)} in all, got {sum(stages)}: use "
                "ranks.stage_sizes"
            )
        shapes = []
        for first, end in pairwise(accumulate(stages, initial=0)):
            for rank in range(tensor_parallel_size):
                heads = own_heads(sizes[0], rank, tensor_parallel_size)
                own = [
                    layer[heads] if first <= index < end else [] for index, layer in enumerate(mask)
                ]
                shapes.append(
                    cls(
                        retrieval_heads=tuple(sum(layer) for layer in own),
                        streaming_heads=tuple(len(layer) - sum(layer) for layer in own),
                        head_size=head_size,
                        dtype_bytes=dtype_bytes,
                        row_bytes=row_bytes,
                        draft_token_bytes=draft_token_bytes,
                    )
                )
        return tuple(shapes)

    @property
    def first_layer(self) -> int:
        """The first layer with a KV head: of the rank's pipeline stage.

        Raises:
            ValueError: there are no heads at all.
        """
        for layer, heads in enumerate(zip(self.retrieval_heads, self.streaming_heads, strict=True)):
            if any(heads):
                return layer
        raise ValueError("the rank has no KV heads: expected at least one layer in every stage")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys, values and scales in one KV head.

        Worked example: D = 128, bfloat16: 512 bytes. Quantised to a byte each, with two scales: 264.
        """
        if self.row_bytes is not None:
            return self.row_bytes
        return 2 * self.head_size * self.dtype_bytes

    @property
    def num_retrieval(self) -> int:
        """Retrieval heads of all layers."""
        return sum(self.retrieval_heads)

    @property
    def num_streaming(self) -> int:
        """Streaming heads of all layers."""
        return sum(self.streaming_heads)

    @property
    def paged_token_bytes(self) -> int:
        """Bytes of one token that stay for good: the retrieval heads' and a draft model's.

        Worked example: R = 3 heads in all, D = 128, 2 bytes, a draft model of 2 layers with one KV
        head of 64 elements: 3 * 512 + 2 * 256 = 2,048 bytes.
        """
        return self.num_retrieval * self.token_bytes + self.draft_token_bytes


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
        tokens are (3 * 1,000 + 5 * 320) * 512 bytes = 2,355,200 bytes.
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
        for span, heads in self._runs(rank):
            if num_tokens < span.slots:
                rest = span.blocks(num_tokens) * span.block_size - num_tokens
                growing += rest * heads * rank.token_bytes
        return growing

    def _runs(self, rank: KVShape) -> tuple[tuple[StreamingSpan, int], ...]:
        """Each kind of run and the streaming heads of a rank that have it."""
        if not self.bin_spans:
            return ((self.span, rank.num_streaming),)
        return self._runs_by_rank[rank]

    @cached_property
    def _runs_by_rank(self) -> dict[KVShape, tuple[tuple[StreamingSpan, int], ...]]:
        runs = {}
        for rank in self.ranks:
            heads = dict.fromkeys(self.bin_spans, 0)
            for layers, span in zip(self.bins, self.bin_spans, strict=True):
                heads[span] += sum(rank.streaming_heads[layer] for layer in layers)
            runs[rank] = tuple(heads.items())
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

        A draft model's heads are paged either way. Layers with a sliding window of their own keep that
        window and no more, in the best layout there is for it: what the window saves is the model's
        merit, not duo's. (Stock vLLM itself holds more: while it computes a prompt, a chunk as well.)

        Worked example: ``layout.full_attention.max_request_tokens(num_blocks)`` is stock's longest
        request in as many blocks of its own size.
        """
        slides = [window is not None for window in self.windows]
        slides = slides or [False] * len(self.ranks[0].streaming_heads)
        ranks = tuple(
            replace(
                rank,
                retrieval_heads=tuple(
                    r if own else r + s
                    for r, s, own in zip(
                        rank.retrieval_heads, rank.streaming_heads, slides, strict=True
                    )
                ),
                streaming_heads=tuple(
                    s if own else 0 for s, own in zip(rank.streaming_heads, slides, strict=True)
                ),
            )
            for rank in self.ranks
        )
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
        kept = sum((span.sink_size + span.recent_size) * n for span, n in self._runs(rank))
        return kept * rank.token_bytes

    def _needed_bytes(self, rank: KVShape, num_tokens: int) -> int:
        kept = sum(span.kept_tokens(num_tokens) * heads for span, heads in self._runs(rank))
        return rank.paged_token_bytes * num_tokens + kept * rank.token_bytes


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
    """
    ranks = (shape,) if isinstance(shape, KVShape) else tuple(shape)
    _check_ranks(ranks)
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
        return _plan_with_windows(ranks, block_size, span, windows, reference_tokens)
    choice = _Search(ranks, block_size, span.slots, reference_tokens).best()
    return Layout(
        ranks=ranks,
        block_size=block_size,
        span=replace(span, block_size=choice.streaming_block),
        bins=choice.bins,
        block_bytes=choice.block_bytes,
    )


def _plan_with_windows(
    ranks: tuple[KVShape, ...],
    block_size: int,
    span: StreamingSpan,
    windows: Windows,
    reference_tokens: int,
) -> Layout:
    """``plan_layout`` of a model whose layers have windows of their own.

    Args:
        ranks: as there.
        block_size: as there.
        span: what the pattern's streaming heads keep; its ``block_size`` is not read.
        windows: one entry per layer.
        reference_tokens: as there.
    """
    _check_windows(ranks, windows)
    kept = [
        span if window is None else replace(span, sink_size=0, recent_size=window)
        for window in windows
    ]
    kinds: dict[StreamingSpan, Kind] = {}
    for kind in dict.fromkeys([span, *kept]):
        widths = tuple(
            tuple(
                heads if own == kind else 0
                for heads, own in zip(rank.streaming_heads, kept, strict=True)
            )
            for rank in ranks
        )
        if any(map(any, widths)):
            kinds[kind] = Kind(kind.slots, widths)
    head_bytes = ranks[0].token_bytes
    paged = max(rank.paged_token_bytes for rank in ranks)
    streaming = max(rank.num_streaming for rank in ranks) * head_bytes
    loads = {
        (rank.num_retrieval, *(sum(kind.widths[index]) for kind in kinds.values()))
        for index, rank in enumerate(ranks)
    }
    choice = search(
        list(kinds.values()),
        Pool(
            head_bytes=head_bytes,
            paged_bytes=paged * block_size,
            stock_bytes=(paged + streaming) * block_size,
            block_size=block_size,
            reference_tokens=reference_tokens,
            tolerance=WINDOW_TOLERANCE,
            max_bins=MAX_BINS,
            bounded=len(loads) == 1,
        ),
    )
    sizes = {kind: packed.streaming_block for kind, packed in zip(kinds, choice.kinds, strict=True)}
    bins = [
        (layers, replace(kind, block_size=sizes[kind]))
        for kind, packed in zip(kinds, choice.kinds, strict=True)
        for layers in packed.bins
    ]
    bins.sort(key=lambda item: item[0])
    return Layout(
        ranks=ranks,
        block_size=block_size,
        # Without heads of the pattern's that stream, its blocks are of no consequence.
        span=replace(span, block_size=sizes.get(span, 1)),
        bins=tuple(layers for layers, _ in bins),
        block_bytes=choice.block_bytes,
        windows=windows,
        bin_spans=tuple(own for _, own in bins),
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


def _check_ranks(ranks: tuple[KVShape, ...]) -> None:
    kinds = {
        (rank.head_size, rank.dtype_bytes, rank.row_bytes, len(rank.retrieval_heads))
        for rank in ranks
    }
    if len(kinds) != 1:
        raise ValueError(
            "expected one shape per rank, all of one head_size, dtype_bytes and number of layers, "
            f"got {len(ranks)} ranks with {sorted(kinds)}: use KVShape.split"
        )
    if not any(rank.num_retrieval or rank.num_streaming for rank in ranks):
        raise ValueError("expected at least one KV head, got none: pass the heads of every layer")


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """A candidate: the bytes of its blocks, and those held at the reference length."""

    bins: Bins
    streaming_block: int
    block_bytes: int
    held: int


class _Search:
    """All layouts worth a look.

    For a number of bins only the narrowest packing counts, since its blocks hold most tokens; for
    blocks as wide as the retrieval group only the largest ``P_s``. Wider blocks are tried too: they
    pay where retrieval heads are few.
    """

    def __init__(
        self, ranks: tuple[KVShape, ...], block_size: int, slots: int, reference_tokens: int
    ) -> None:
        self.streaming = [rank.streaming_heads for rank in ranks]
        self.head_bytes = ranks[0].token_bytes
        self.most_streaming = max(rank.num_streaming for rank in ranks)
        totals = {(rank.num_retrieval, rank.num_streaming) for rank in ranks}
        self.are_alike = len(totals) == 1
        self.block_size = block_size
        self.slots = slots
        self.reach = min(slots, reference_tokens)
        self.retrieval_blocks = cdiv(reference_tokens, block_size)
        # Bytes of a block of the retrieval group, and of all heads' as stock has it.
        self.retrieval_width = max(rank.paged_token_bytes for rank in ranks) * block_size
        streaming_width = self.most_streaming * self.head_bytes * block_size
        self.stock_width = self.retrieval_width + streaming_width
        self.widest_layer = max(max(widths, default=0) for widths in self.streaming)

    def best(self) -> _Choice:
        """The candidate to take, as ``plan_layout`` describes it."""
        if not self.retrieval_width or not self.most_streaming:
            return self._of_one_class()
        within: list[_Choice] = []
        others: list[_Choice] = []
        least = sys.maxsize
        for num_bins in range(1, min(len(self.streaming[0]), MAX_BINS) + 1):
            narrowest = max(least_capacity(widths, num_bins) for widths in self.streaming)
            if self._least_held(num_bins, narrowest) >= least:
                continue
            bins = spread_ranks(self.streaming, num_bins)
            for choice in self._candidates(bins):
                if choice.held > least * (1 + HELD_TOLERANCE):
                    continue
                if not self.are_alike or self._is_within_stock(choice):
                    within.append(choice)
                    least = min(least, choice.held)
                else:
                    others.append(choice)
            if self._width(bins) == self.widest_layer:
                break  # more bins would be no narrower
        candidates = within or others
        most = min(choice.held for choice in candidates) * (1 + HELD_TOLERANCE)
        return min(
            (choice for choice in candidates if choice.held <= most),
            key=lambda choice: (len(choice.bins), choice.held, -choice.streaming_block),
        )

    def _of_one_class(self) -> _Choice:
        """One bin of all layers, or none; a run of as many blocks as stock's, and evenly cut.

        Worked example: no retrieval heads, 320 slots, ``P_r`` 128: 3 blocks of 107 tokens.
        """
        streaming_block = cdiv(self.slots, cdiv(self.slots, self.block_size))
        bins = spread_ranks(self.streaming, 1) if self.most_streaming else ()
        width = max(self.retrieval_width, self.most_streaming * self.head_bytes * streaming_block)
        return _Choice(bins=bins, streaming_block=streaming_block, block_bytes=width, held=0)

    def _width(self, bins: Bins) -> int:
        """Heads of the widest bin, on the rank where it is widest."""
        return max(
            sum(widths[layer] for layer in layers) for widths in self.streaming for layers in bins
        )

    def _candidates(self, bins: Bins) -> Iterator[_Choice]:
        """Every ``P_s`` for these bins, from the largest that needs no wider blocks."""
        width = self._width(bins) * self.head_bytes
        first = min(self.slots, self.retrieval_width // width)
        last = min(self.slots, self.stock_width // width)
        for streaming_block in range(max(first, 1), max(first, last, 1) + 1):
            block_bytes = max(self.retrieval_width, width * streaming_block)
            blocks = self.retrieval_blocks + len(bins) * cdiv(self.reach, streaming_block)
            yield _Choice(
                bins=bins,
                streaming_block=streaming_block,
                block_bytes=block_bytes,
                held=blocks * block_bytes,
            )

    def _least_held(self, num_bins: int, narrowest: int) -> int:
        """What a request holds at least, if no bin can be narrower than ``narrowest`` heads."""
        wider = (self.retrieval_width // self.head_bytes + 1) * self.head_bytes
        token_bytes = narrowest * self.head_bytes
        bound = self.retrieval_blocks * wider + num_bins * max(token_bytes * self.reach, wider)
        streaming_block = min(self.slots, self.retrieval_width // token_bytes)
        if not streaming_block:
            return bound
        blocks = self.retrieval_blocks + num_bins * cdiv(self.reach, streaming_block)
        return min(bound, blocks * self.retrieval_width)

    def _is_within_stock(self, choice: _Choice) -> bool:
        """Whether no request holds more than stock vLLM's and one block a group.

        Worst are the requests whose last token opened a streaming block: between two of them, and
        beyond the run, stock grows at least as fast.
        """
        if choice.block_bytes > self.stock_width:
            return False
        groups = 1 + len(choice.bins)
        for full in reversed(range(cdiv(self.slots, choice.streaming_block))):
            paged = full * choice.streaming_block // self.block_size + 1
            held = (paged + len(choice.bins) * (full + 1) - groups) * choice.block_bytes
            if held > paged * self.stock_width:
                return False
        return True
