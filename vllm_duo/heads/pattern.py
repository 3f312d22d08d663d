"""Head patterns: one value per KV head, and the cut into retrieval and streaming heads.

The folder format is that of DuoAttention (arXiv:2410.10819), so published patterns load as they
are. L is the number of layers, Hkv the number of KV heads of a layer.
"""

import hashlib
import math
import os
import struct
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from vllm_duo.heads.folder import (
    MAX_VALUE,
    MIN_VALUE,
    find_out_of_range,
    read_folder,
    write_folder,
)

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True)
class HeadSelection:
    """Which KV heads are retrieval heads; two selections are equal when their hashes are.

    Args:
        retrieval: [L, Hkv] bool, True for a retrieval head, False for a streaming head. Copied
            and kept read-only.

    Attributes:
        mask_hash: first 16 hex digits of SHA-256 over little-endian u32 layers, u32 KV heads,
            then one byte a head row by row (1 = retrieval).

    Raises:
        ValueError: `retrieval` has no heads or is not a two-dimensional bool array.
    """

    retrieval: npt.NDArray[np.bool_] = field(compare=False)
    mask_hash: str = field(init=False)

    def __post_init__(self) -> None:
        mask = np.asarray(self.retrieval)
        if mask.ndim != 2 or mask.size == 0 or mask.dtype != np.bool_:
            raise ValueError(
                "retrieval mask: expected a bool array [layers, KV heads] with at least one head, "
                f"got {mask.dtype} {list(mask.shape)}: pass one flag per KV head"
            )
        payload = struct.pack("<II", *mask.shape) + mask.tobytes()
        object.__setattr__(self, "retrieval", _read_only(mask))
        object.__setattr__(self, "mask_hash", hashlib.sha256(payload).hexdigest()[:16])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.retrieval,)  # pickling an array alone would lose read-only

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return int(self.retrieval.shape[0])

    @property
    def num_kv_heads(self) -> int:
        """KV heads of one layer, before any tensor-parallel split."""
        return int(self.retrieval.shape[1])

    @property
    def sparsity(self) -> float:
        """Share of the KV heads that stream, in [0, 1], as it came out after rounding."""
        return int((~self.retrieval).sum()) / self.retrieval.size


@dataclass(frozen=True, eq=False)
class HeadPattern:
    """One value per KV head: near 0 it streams without loss, near 1 it needs the whole context.

    Args:
        values: [L, Hkv] float64, raw as published or trained (slightly outside [0, 1] is usual).
            Copied and kept read-only.
        metadata: the contents of config.json; every key is optional, unknown keys are kept.
        path: the folder it was loaded from, None if it was made in memory.

    Raises:
        ValueError: `values` has no heads, is not two-dimensional, or holds NaN or a value outside
            [-0.01, 1.01].
    Source: DuoAttention, arXiv:2410.10819, `attn_patterns` of its repository.
    """

    values: npt.NDArray[np.float64]
    metadata: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        if values.ndim != 2 or values.size == 0:
            raise ValueError(
                "head pattern: expected an array [layers, KV heads] with at least one head, "
                f"got shape {list(values.shape)}: pass one value per KV head"
            )
        if bad := find_out_of_range(values):
            layer, head = bad
            raise ValueError(
                f"head pattern, layer {layer}, KV head {head}: expected a value in "
                f"[{MIN_VALUE}, {MAX_VALUE}], got {float(values[bad])!r}: clip or recompute it"
            )
        object.__setattr__(self, "values", _read_only(values))
        object.__setattr__(self, "metadata", deepcopy(self.metadata))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.values, self.metadata, self.path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a pattern folder: full_attention_heads.tsv and, if present, config.json.

        Raises:
            ValueError: the folder or the TSV is missing; the TSV is empty or ragged, or has a cell
                that is no number, NaN or outside [-0.01, 1.01] (file, line and column are named);
                config.json is not a JSON object.
        """
        values, metadata = read_folder(Path(path))
        return cls(values, metadata, Path(path))

    @classmethod
    def uniform(cls, num_layers: int, num_kv_heads: int, value: float = 1.0) -> Self:
        """A pattern in memory with the same value for every head ([L, Hkv])."""
        return cls(np.full((num_layers, num_kv_heads), value, dtype=np.float64))

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return int(self.values.shape[0])

    @property
    def num_kv_heads(self) -> int:
        """KV heads of one layer, before any tensor-parallel split."""
        return int(self.values.shape[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the folder, made if need be; raw values in the published TSV format, byte for byte.

        Raises:
            OSError: the folder cannot be made or written.
            TypeError: `metadata` holds something that JSON cannot.
        """
        write_folder(Path(path), self.values, self.metadata)

    def select(
        self,
        *,
        sparsity: float | None = None,
        threshold: float | None = None,
        balance_ranks: int = 1,
        layers: Sequence[int] | None = None,
    ) -> HeadSelection:
        """Cut the heads into retrieval and streaming; pass exactly one of the two settings.

        Values are clipped to [0, 1] first. Example: at sparsity 0.5, 3 layers x 3 heads stream
        floor(0.5 * 9 + 0.5) = 5 heads. Balanced over 2 ranks, 3 layers x 4 heads stream
        floor(0.5 * 6 + 0.5) = 3 of heads 0 and 1 of all layers, and 3 of heads 2 and 3.

        Args:
            sparsity: share of the KV heads that stream, in [0, 1]: exactly
                floor(sparsity * n + 0.5) of n heads, those with the lowest values. Among equal
                values the next one comes from the layer with most retrieval heads left, then the
                lower layer, then the lower head.
            threshold: in [0, 1]; a head with this value or above is a retrieval head.
            balance_ranks: tensor-parallel size over which the streaming heads are balanced: each
                rank's own heads are cut as above, so that all ranks stream the same share and none
                holds more memory than another. 1 (the default) cuts all heads together. With more
                ranks than KV heads, which vLLM then copies, every head of a layer is its own part.
            layers: the layers whose heads are cut, as if they were all; every head of the others
                streams. None: all layers.

        Raises:
            ValueError: neither or both are given, or one is not a number in [0, 1];
                `balance_ranks` comes with a threshold or does not divide the KV heads (nor they it).
        """
        if layers is not None and len(layers) < self.num_layers:
            retrieval = np.zeros(self.values.shape, dtype=np.bool_)
            if layers:
                part = HeadPattern(self.values[list(layers)])
                retrieval[list(layers)] = part.select(
                    sparsity=sparsity, threshold=threshold, balance_ranks=balance_ranks
                ).retrieval
            return HeadSelection(retrieval)
        clipped = np.clip(self.values, 0.0, 1.0)
        if sparsity is not None and threshold is None:
            _check_share("sparsity", sparsity)
            parts = np.split(clipped, _count_parts(balance_ranks, self.num_kv_heads), axis=1)
            num_streaming = math.floor(float(sparsity) * parts[0].size + 0.5)
            masks = [_keep_highest(part, num_streaming) for part in parts]
            return HeadSelection(np.concatenate(masks, axis=1))
        if threshold is not None and sparsity is None:
            _check_share("threshold", threshold)
            if balance_ranks != 1:
                raise ValueError(
                    f"balance_ranks: expected 1 with a threshold, got {balance_ranks}: a threshold "
                    "streams no fixed share; pass sparsity instead"
                )
            return HeadSelection(clipped >= float(threshold))
        got = "neither" if sparsity is None else "both"
        raise ValueError(
            f"select: expected exactly one of sparsity and threshold, got {got}: "
            "pass for example sparsity=0.5"
        )

    def validate_for(self, num_layers: int, num_kv_heads: int, model_name: str) -> None:
        """Check the shape against a model's attention layers and KV heads per layer.

        Raises:
            ValueError: either differs; names both figures, the pattern and the model.
        """
        wrong = [
            f"head pattern has {has} {unit}, the model has {needs}"
            for has, needs, unit in (
                (self.num_layers, num_layers, "layers"),
                (self.num_kv_heads, num_kv_heads, "KV heads per layer"),
            )
            if has != needs
        ]
        if wrong:
            source = "made in memory" if self.path is None else str(self.path)
            raise ValueError(
                f"{'; '.join(wrong)}: use a pattern made for this checkpoint (pattern=...) "
                f"[pattern: {source}, model: {model_name}]"
            )


def _read_only(array: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
    """Copy onto immutable bytes, so that write access cannot be switched back on."""
    return np.frombuffer(array.tobytes(), dtype=array.dtype).reshape(array.shape)


def _keep_highest(clipped: npt.NDArray[np.float64], num_streaming: int) -> npt.NDArray[np.bool_]:
    """Retrieval mask [L, Hkv] after exactly `num_streaming` lowest heads of [L, Hkv] stream."""
    if num_streaming == 0:
        return np.ones(clipped.shape, dtype=np.bool_)
    cut = np.partition(clipped.ravel(), num_streaming - 1)[num_streaming - 1]
    retrieval: npt.NDArray[np.bool_] = clipped >= cut
    tied = clipped == cut
    for _ in range(num_streaming - int((~retrieval).sum())):
        left = np.where(tied.any(axis=1), retrieval.sum(axis=1), -1)  # [L]
        layer = int(left.argmax())  # argmax takes the first, so the lower layer and head
        head = int(tied[layer].argmax())
        retrieval[layer, head] = tied[layer, head] = False
    return retrieval


def _count_parts(balance_ranks: int, num_kv_heads: int) -> int:
    """Parts of a layer's KV heads that lie on different ranks."""
    if balance_ranks < 1 or (num_kv_heads % balance_ranks and balance_ranks % num_kv_heads):
        raise ValueError(
            f"balance_ranks: expected a tensor-parallel size that divides the {num_kv_heads} KV "
            f"heads, or is a multiple of them, got {balance_ranks}: choose another"
        )
    return min(balance_ranks, num_kv_heads)


def _check_share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) <= 1.0:
        raise ValueError(
            f"{name}: expected a number from 0 to 1, got {value!r}: pass for example {name}=0.5"
        )
