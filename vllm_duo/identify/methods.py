"""What an identification method is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_duo.heads import HeadPattern, HeadSelection
from vllm_duo.identify.attention import StreamingRule
from vllm_duo.identify.haystack import FileText, Haystack, MadeText
from vllm_duo.identify.model import HookedModel
from vllm_duo.identify.samples import SampleMaker
from vllm_duo.identify.settings import Aggregation, IdentifySettings

Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int, str], None]
"""(steps or samples done, all of them, a few words on how it goes)."""

DEFAULT_MAX_LENGTH = 2048
LEAST_HIDDEN = 32
"""The longest sample has more tokens than these that no streaming head keeps."""
INDUCTION_REPEATS = 4
"""How often `induction` repeats its tokens."""


def by_layer(found: Mapping[int, Tensor], num_layers: int) -> Tensor:
    """[..., Hq] of each layer that a policy computed, as [L, ..., Hq]; zeros for the others.

    Layers with a sliding window of the model's own never ask the policy: all of their heads stream.
    """
    nothing = torch.zeros_like(next(iter(found.values())))
    return torch.stack([found.get(layer, nothing) for layer in range(num_layers)])


@dataclass(frozen=True)
class Scores:
    """What a method found.

    Attributes:
        values: [L, Hkv] in [0, 1].
        details: further figures for config.json; JSON types only.
        query_heads: named scores of the query heads, [L, Hq] each, where the method has them.
    """

    values: Floats
    details: dict[str, Any] = field(default_factory=dict)
    query_heads: dict[str, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run: a hooked model and complete settings (see `complete`)."""

    model: HookedModel
    settings: IdentifySettings

    @property
    def rule(self) -> StreamingRule:
        """What streaming heads keep."""
        settings = self.settings
        return StreamingRule(settings.sink_size, settings.recent_size, settings.kernel)

    def select(self, pattern: HeadPattern, sparsity: float) -> HeadSelection:
        """The heads that a server of this model would choose."""
        return pattern.select(sparsity=sparsity, layers=self.model.info.chosen_layers)

    @property
    def least_length(self) -> int:
        """Tokens that the longest sample must have; shorter ones look the same to every head.

        Copies of `induction` lie one period apart, behind the token that begins a text if there is one.
        """
        kept = kept_tokens(self.settings, self.model)
        least = kept + LEAST_HIDDEN + 1
        if self.settings.method != "induction":
            return least
        begin = self.model.tokenizer.bos_token_id is not None
        return max(least, INDUCTION_REPEATS * (kept + 1) + begin)

    def lengths(self) -> tuple[int, int]:
        """Tokens of the shortest and of the longest sample."""
        assert self.settings.min_length is not None
        assert self.settings.max_length is not None
        return self.settings.min_length, self.settings.max_length

    def samples(self) -> SampleMaker:
        """Makes the samples that the method learns from."""
        settings = self.settings
        return SampleMaker(
            self.model.tokenizer,
            self.haystack(),
            settings.seed,
            self.lengths(),
            keys=settings.keys,
            key_style=settings.key_style,
            key_length=settings.key_length,
        )

    def haystack(self) -> Haystack:
        """The text around the keys."""
        text: Path | None = self.settings.text
        if text is None:
            return MadeText()
        return FileText(text, self.model.tokenizer, self.lengths()[1])


class ForwardMethod(Protocol):
    """Scores samples one by one, without gradients; the samples may go to several processes."""

    name: str
    default_samples: int

    def score(self, job: Job, index: int) -> Floats:
        """Raw scores of sample `index`; the last two dimensions are [L, Hq]."""
        ...

    def combine(self, job: Job, scores: Floats) -> Scores:
        """The pattern's values from the raw scores of all samples, [n, ..., L, Hq]."""
        ...


def kept_tokens(settings: IdentifySettings, model: HookedModel) -> int:
    """What lies further back no streaming head sees, and no layer that slides."""
    return max(settings.sink_size + settings.recent_size, model.info.largest_window)


def complete(settings: IdentifySettings, model: HookedModel) -> IdentifySettings:
    """Fill in what depends on the model, and check it.

    Raises:
        ValueError: lengths that the model or the rule cannot have.
    """
    limit = model.info.max_positions
    window = model.info.largest_window
    short = kept_tokens(settings, model) + LEAST_HIDDEN
    longest = settings.max_length or min(max(DEFAULT_MAX_LENGTH, 2 * window), limit)
    if longest > limit:
        raise ValueError(
            f"--max-length {longest}: expected at most the model's {limit} positions: lower it"
        )
    if longest <= short:
        raise ValueError(
            f"--max-length {longest}: expected more than {short} tokens, since a streaming head "
            f"keeps {settings.sink_size} + {settings.recent_size}"
            + (f", layers of the model's own slide over {window}" if window else "")
            + " and shorter samples look the same to every head: raise it, or lower --sink-size and "
            "--recent-size"
        )
    shortest = settings.min_length or min(
        longest, max(longest // 8, 2 * kept_tokens(settings, model))
    )
    if shortest > longest:
        raise ValueError(f"min_length {shortest} is above max_length {longest}: lower it")
    check_length = settings.check_length or longest
    if not short < check_length <= limit:
        raise ValueError(
            f"--check-length {check_length}: expected more than {short} tokens and at most the "
            f"model's {limit} positions: choose another"
        )
    return settings.model_copy(
        update={
            "max_length": longest,
            "min_length": shortest,
            "check_length": check_length,
            "device": str(model.device),
            "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
        }
    )


def to_kv_heads(scores: Floats, num_kv_heads: int, rule: Aggregation) -> Floats:
    """Scores of query heads as scores of KV heads: [L, Hq] -> [L, Hkv].

    Query heads h * group to (h + 1) * group - 1 read KV head h. Under `max` a KV head is as needed
    as the query head that needs it most; under `mean` as its query heads are on average.
    """
    grouped = scores.reshape(scores.shape[0], num_kv_heads, -1)
    found: Floats = grouped.max(axis=2) if rule == "max" else grouped.mean(axis=2)
    return found
