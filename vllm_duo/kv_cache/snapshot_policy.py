"""Where snapshots of streaming state are worth their blocks: chosen by measurement.

``docs/prefix-caching.md`` has the comparison and what was rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from vllm_duo.kv_cache.rounding import cdiv


class Reason(Enum):
    """Why a snapshot was stored, which says how it is likely to be hit."""

    INTERVAL = "interval"
    """A multiple of the interval: prompts that share much, before anybody knows where they part."""
    BRANCH = "branch"
    """Where prompts were found to part: the next one will part there too."""
    PROMPT = "prompt"
    """The last block boundary of a prompt at which vLLM may resume it: the same prompt again, or a
    chat's next turn. With an EAGLE head vLLM resumes a block earlier."""
    ANSWER = "answer"
    """The last boundary of an answer so far: a chat's next turn."""

    @property
    def one_chat(self) -> bool:
        """Whether the chat's next turn makes it obsolete."""
        return self in (Reason.PROMPT, Reason.ANSWER)


@dataclass(frozen=True)
class SnapshotPolicy:
    """Chooses boundaries.

    Attributes:
        block_size: boundaries are its multiples, in tokens.
        interval: tokens between the regular snapshots, rounded up to whole blocks.
        answer_interval: tokens between the snapshots of an answer, likewise.
    """

    block_size: int
    interval: int
    answer_interval: int

    def boundaries(
        self, low: int, high: int, replay: Sequence[int], branch: int
    ) -> list[tuple[int, Reason]]:
        """Where to store, in tokens, after ``low`` up to ``high``, ascending.

        Worked example: blocks of 16 tokens, interval 1,024, a prompt of 1,500 tokens that parts from
        another one at 700: 688 (branch), 1,024 (interval) and 1,488 (prompt). With an EAGLE head
        vLLM resumes the prompt at 1,472 at most, which is then stored instead.

        Args:
            low: tokens before the step, of whole blocks.
            high: tokens after it, of whole blocks.
            replay: positions at which vLLM expects the prompt to be resumed.
            branch: where another prompt was found to part from this one; 0 if nowhere.
        """
        size = self.block_size
        every = cdiv(self.interval, size) * size
        points = dict.fromkeys(range((low // every + 1) * every, high + 1, every), Reason.INTERVAL)
        prompt_end = max(replay) // size * size
        points[prompt_end] = Reason.PROMPT
        points[branch // size * size] = Reason.BRANCH
        every = cdiv(self.answer_interval, size) * size
        last = high // every * every
        if last > prompt_end:
            # Of an answer only the last one counts: each takes the place of the one before.
            points.setdefault(last, Reason.ANSWER)
        return sorted(
            (point for point in points.items() if low < point[0] <= high),
            key=lambda point: point[0],
        )
