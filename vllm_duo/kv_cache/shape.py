"""How many KV heads of each class a rank has, and the bytes of a token in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import gcd

from vllm_duo.kv_cache.ranks import own_heads, split_problem


@dataclass(frozen=True, kw_only=True)
class KVShape:
    """The KV heads of one rank by class, per layer; none in the layers of other pipeline stages.

    Attributes:
        retrieval_heads: ``R`` of each layer.
        streaming_heads: ``S`` of each layer; as long as ``retrieval_heads``.
        head_size: ``D``, in elements.
        dtype_bytes: bytes of one number of the model's own dtype.
        row_bytes: bytes of one token in one KV head of a quantised cache (``CacheFormat.row_bytes``).
        streaming_quantised: False: only the retrieval heads' cache is, and the streaming heads keep
            the model's own dtype.
        skipped_layers: whose caches, of both classes, keep the model's own dtype, too.
        draft_token_bytes: bytes of one token in all layers of a draft model, whose heads keep every
            token and may have another size; they lie in the retrieval heads' blocks.
    """

    retrieval_heads: tuple[int, ...]
    streaming_heads: tuple[int, ...]
    head_size: int
    dtype_bytes: int
    row_bytes: int | None = None
    streaming_quantised: bool = True
    skipped_layers: frozenset[int] = frozenset()
    draft_token_bytes: int = 0

    def __post_init__(self) -> None:
        if len(self.retrieval_heads) != len(self.streaming_heads):
            raise ValueError(
                f"retrieval_heads has {len(self.retrieval_heads)} layers and streaming_heads "
                f"{len(self.streaming_heads)}: both need one entry per layer"
            )
        if not self.skipped_layers <= set(range(len(self.retrieval_heads))):
            raise ValueError(
                f"skipped_layers: expected layers below {len(self.retrieval_heads)}, got "
                f"{sorted(self.skipped_layers)}: correct them"
            )

    @classmethod
    def split(
        cls,
        retrieval: Iterable[Iterable[bool]],
        *,
        head_size: int,
        dtype_bytes: int,
        row_bytes: int | None = None,
        streaming_quantised: bool = True,
        skipped_layers: frozenset[int] = frozenset(),
        tensor_parallel_size: int = 1,
        draft_token_bytes: int = 0,
        stage_sizes: Sequence[int] | None = None,
    ) -> tuple[KVShape, ...]:
        """The shape of every rank, with the heads where vLLM puts them (``ranks.own_heads``).

        Ranks are numbered as vLLM's workers: all of the first pipeline stage, then of the next.

        Args:
            retrieval: [L, Hkv], true for a retrieval head (``HeadSelection.retrieval``).
            head_size: ``D``, in elements.
            dtype_bytes: bytes of one number of the model's own dtype.
            row_bytes: bytes of one token in one KV head of a quantised cache.
            streaming_quantised: whether the streaming heads' cache is, too.
            skipped_layers: whose caches are not.
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
                        streaming_quantised=streaming_quantised,
                        skipped_layers=skipped_layers,
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
        """Bytes of one token's keys, values and scales in one retrieval head of a layer not skipped.

        Worked example: D = 128, bfloat16: 512 bytes. Quantised to a byte each, with two scales: 264.
        """
        return self._model_token_bytes if self.row_bytes is None else self.row_bytes

    @property
    def streaming_token_bytes(self) -> int:
        """The same in one streaming head.

        Worked example: D = 128, four bits and two scales: 136 bytes; with ``streaming_quantised`` False
        and bfloat16 512.
        """
        return self.token_bytes if self.streaming_quantised else self._model_token_bytes

    @property
    def has_one_format(self) -> bool:
        """Whether a token takes as many bytes in a layer's heads of either class."""
        all_skipped = len(self.skipped_layers) == len(self.retrieval_heads)
        return self.streaming_token_bytes == self.token_bytes or all_skipped

    @property
    def _model_token_bytes(self) -> int:
        return 2 * self.head_size * self.dtype_bytes

    def paged_layer_bytes(self, layer: int) -> int:
        """Bytes of one token in a layer's retrieval heads.

        Worked example: R = 3, D = 128, bfloat16 and fp8: 768 bytes, in a layer that is skipped 1,536.
        """
        skipped = layer in self.skipped_layers
        return self.retrieval_heads[layer] * (
            self._model_token_bytes if skipped else self.token_bytes
        )

    def ring_layer_bytes(self, layer: int) -> int:
        """The same in its streaming heads."""
        skipped = layer in self.skipped_layers
        head_bytes = self._model_token_bytes if skipped else self.streaming_token_bytes
        return self.streaming_heads[layer] * head_bytes

    @property
    def streaming_unit(self) -> int:
        """Bytes of which every layer's ``ring_layer_bytes`` is a multiple.

        Worked example: D = 128, bfloat16 and fp8: 256 bytes; 512 if no layer is quantised. With two
        scales, 264 and 512 bytes a head: 8.
        """
        if not self.skipped_layers:
            return self.streaming_token_bytes
        return gcd(self.streaming_token_bytes, self._model_token_bytes)

    @property
    def streaming_units(self) -> tuple[int, ...]:
        """Per layer its ``ring_layer_bytes`` in units: without skipped layers its streaming heads."""
        unit = self.streaming_unit
        return tuple(
            self.ring_layer_bytes(layer) // unit for layer in range(len(self.streaming_heads))
        )

    @property
    def num_retrieval(self) -> int:
        """Retrieval heads of all layers."""
        return sum(self.retrieval_heads)

    @property
    def num_streaming(self) -> int:
        """Streaming heads of all layers."""
        return sum(self.streaming_heads)

    @cached_property
    def paged_token_bytes(self) -> int:
        """Bytes of one token that stay for good: the retrieval heads' and a draft model's.

        Worked example: R = 3 heads in all, D = 128, 2 bytes, a draft model of 2 layers with one KV
        head of 64 elements: 3 * 512 + 2 * 256 = 2,048 bytes.
        """
        own = sum(map(self.paged_layer_bytes, range(len(self.retrieval_heads))))
        return own + self.draft_token_bytes

    @cached_property
    def ring_token_bytes(self) -> int:
        """Bytes of one token in all streaming heads."""
        return sum(map(self.ring_layer_bytes, range(len(self.streaming_heads))))

    def paged(self, slides: Sequence[bool]) -> KVShape:
        """The same heads, all of them paged but for those of the layers that slide, in one format.

        Args:
            slides: per layer, whether it has a sliding window of the model's own.

        Worked example: R = (1, 0) and S = (3, 4), the second layer slides: R = (4, 0), S = (0, 4).
        """
        heads = list(zip(self.retrieval_heads, self.streaming_heads, slides, strict=True))
        return replace(
            self,
            retrieval_heads=tuple(r if own else r + s for r, s, own in heads),
            streaming_heads=tuple(s if own else 0 for _, s, own in heads),
            streaming_quantised=True,
        )


def check_ranks(ranks: Sequence[KVShape]) -> None:
    """Check that shapes are the ranks of one model.

    Raises:
        ValueError: there are none, they are of different models, or they have no heads at all.
    """
    kinds = {
        (
            *(rank.head_size, rank.token_bytes, rank.streaming_token_bytes),
            *(len(rank.retrieval_heads), *sorted(rank.skipped_layers)),
        )
        for rank in ranks
    }
    if len(kinds) != 1:
        raise ValueError(
            "expected one shape per rank, all of one head_size, token_bytes, number of layers and "
            f"skipped layers, got {len(ranks)} ranks with {sorted(kinds)}: use KVShape.split"
        )
    if not any(rank.num_retrieval or rank.num_streaming for rank in ranks):
        raise ValueError("expected at least one KV head, got none: pass the heads of every layer")
