"""Does the pattern hold? Pass-key accuracy with all, the chosen and no heads keeping everything.

Held-back samples: none that the method saw, one key each, whose key no streaming head sees where
the answer begins. Attention is that of the rule, as a server computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import sqrt
from typing import Any, Literal

import torch

from vllm_duo.heads import HeadPattern
from vllm_duo.identify.methods import Job
from vllm_duo.identify.model import HookedModel
from vllm_duo.identify.policies import ClassPolicy, Policy, full_policy
from vllm_duo.identify.samples import Sample

LARGEST_LOSS = 0.05
"""A pattern is trusted when it answers at most this share of the samples less than full attention."""
LOWEST_FULL = 0.5
"""Below this share right with full attention the samples do not test the pattern."""
SMALLEST_GAP = 0.2
"""The all-streaming model must fail by at least this much, else nothing needed to be retrieved."""

Verdict = Literal["trusted", "not trusted", "cannot be judged"]


@dataclass(frozen=True)
class CheckResult:
    """Shares of the samples answered right.

    Attributes:
        samples: how many samples.
        length: their tokens.
        sparsity: share of heads that stream in the chosen pattern.
        full: with full attention.
        chosen: with the pattern at `sparsity`.
        streaming: with every head streaming.
        by_sparsity: with the pattern at other sparsities.
        inverted: with as many streaming heads as in `chosen`, those of highest value.
    """

    samples: int
    length: int
    sparsity: float
    full: float
    chosen: float
    streaming: float
    by_sparsity: dict[float, float]
    inverted: float

    @property
    def verdict(self) -> Verdict:
        """Whether the pattern can be trusted at `sparsity`."""
        if self.full < LOWEST_FULL or self.full - self.streaming < SMALLEST_GAP:
            return "cannot be judged"
        return "trusted" if self.full - self.chosen <= LARGEST_LOSS + 1e-9 else "not trusted"

    @property
    def reason(self) -> str:
        """The verdict in a sentence."""
        loss = f"{percent(self.chosen)} with the chosen heads, {percent(self.full)} with all"
        if self.full < LOWEST_FULL:
            return (
                f"the model itself answers only {percent(self.full)} of these samples, less than "
                f"{percent(LOWEST_FULL)}: try shorter or simpler samples"
            )
        if self.full - self.streaming < SMALLEST_GAP:
            return (
                f"with every head streaming it still answers {percent(self.streaming)} "
                f"({percent(self.full)} with all): these samples need no retrieval, or the heads "
                "pass the key on from layer to layer; try longer samples"
            )
        return f"{loss}, {percent(self.streaming)} with none keeping all"

    def to_json(self) -> dict[str, Any]:
        """For config.json."""
        found = asdict(self) | {"verdict": self.verdict, "reason": self.reason}
        found["by_sparsity"] = {f"{key:g}": value for key, value in self.by_sparsity.items()}
        return found


def check_pattern(
    job: Job,
    pattern: HeadPattern,
    sparsities: tuple[float, ...] = (0.25, 0.5, 0.75),
    progress: Callable[[int, int, str], None] | None = None,
) -> CheckResult:
    """Measure a pattern on held-back samples.

    Raises:
        ValueError: the samples would not hide their keys; raise check_length.
    """
    settings = job.settings
    assert settings.check_length is not None
    maker = replace(job.samples(), keys=1, lengths=(settings.check_length, settings.check_length))
    furthest = max(settings.recent_size, job.model.info.largest_window)
    samples = maker.make_hidden("check", settings.check_samples, settings.sink_size, furthest)
    chosen = settings.check_sparsity
    upside_down = HeadPattern(1.0 - pattern.values.clip(0.0, 1.0))
    modes: dict[str, Policy] = {
        "full": full_policy,
        "streaming": _classes(job, pattern, 1.0),
        "inverted": _classes(job, upside_down, chosen),
        **{f"at {s:g}": _classes(job, pattern, s) for s in {*sparsities, chosen}},
    }
    found = {}
    for done, (mode, policy) in enumerate(sorted(modes.items())):
        if progress:
            progress(done, len(modes), f"self-check: {mode}")
        found[mode] = accuracy(job.model, samples, policy, settings.key_style)
    return CheckResult(
        samples=len(samples),
        length=settings.check_length,
        sparsity=chosen,
        full=found["full"],
        chosen=found[f"at {chosen:g}"],
        streaming=found["streaming"],
        by_sparsity={s: found[f"at {s:g}"] for s in sorted({*sparsities, chosen})},
        inverted=found["inverted"],
    )


@torch.no_grad()
def accuracy(
    model: HookedModel, samples: list[Sample], policy: Policy, key_style: str = "digits"
) -> float:
    """Share of samples whose keys greedy decoding gives back.

    The right answer is appended: the most likely token is right at every place of a key exactly when
    greedy decoding yields it. What follows a key of digits must not begin with a digit.
    """
    right = 0
    for sample in samples:
        rows = sample.key_queries()
        ends = [end - 1 for _, end in sample.keys]
        hidden = model.hidden(torch.tensor([sample.ids]), policy)[0]
        predicted = model.logits(hidden[[*rows, *ends]]).argmax(-1).tolist()
        expected = [sample.ids[row + 1] for row in rows]
        following = model.tokenizer.batch_decode([[token] for token in predicted[len(rows) :]])
        longer = key_style == "digits" and any(text[:1].isdecimal() for text in following)
        right += predicted[: len(rows)] == expected and not longer
    return right / len(samples)


def wilson_interval(share: float, samples: int) -> tuple[float, float]:
    """95 % interval of a share that was measured on so many samples (Wilson, 1927)."""
    z = 1.96
    middle = share + z * z / (2 * samples)
    spread = z * sqrt(share * (1 - share) / samples + z * z / (4 * samples**2))
    scale = 1 + z * z / samples
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def percent(share: float) -> str:
    """97.5 % for 0.975."""
    return f"{100 * share:.1f} %"


def _classes(job: Job, pattern: HeadPattern, sparsity: float) -> ClassPolicy:
    retrieval = job.select(pattern, sparsity).retrieval.copy()
    return ClassPolicy(torch.from_numpy(retrieval), job.rule)
