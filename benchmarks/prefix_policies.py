"""Other ways of choosing which streaming state to keep, for comparison with the one in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

from vllm_duo.kv_cache import snapshot_manager
from vllm_duo.kv_cache.snapshot_policy import Reason, SnapshotPolicy

Points = list[tuple[int, Reason]]


class EveryBlock(SnapshotPolicy):
    """At every block boundary: as dense as full attention's hits, one ring a block."""

    def boundaries(self, low: int, high: int, replay: Sequence[int], branch: int) -> Points:
        """All of them."""
        size = self.block_size
        return [(point, Reason.BRANCH) for point in range(low + size, high + 1, size)]


class ChunkEnds(SnapshotPolicy):
    """Where a step happens to end, and nowhere else."""

    def boundaries(self, low: int, high: int, replay: Sequence[int], branch: int) -> Points:
        """The step's last block boundary."""
        return [(high, Reason.ANSWER if high > max(replay) else Reason.BRANCH)]


class IntervalOnly(SnapshotPolicy):
    """At multiples of the interval, and nowhere else."""

    def boundaries(self, low: int, high: int, replay: Sequence[int], branch: int) -> Points:
        """The multiples."""
        points = super().boundaries(low, high, replay, branch)
        return [(point, Reason.BRANCH) for point, _ in points if point % self.interval == 0]


class WithoutInterval(SnapshotPolicy):
    """No regular snapshots: prompt ends, answers and branches."""

    def boundaries(self, low: int, high: int, replay: Sequence[int], branch: int) -> Points:
        """All but the regular ones."""
        points = super().boundaries(low, high, replay, branch)
        return [point for point in points if point[1] is not Reason.INTERVAL]


class WithoutAnswers(SnapshotPolicy):
    """Answers are not kept: the next turn of a chat computes the last answer again."""

    def boundaries(self, low: int, high: int, replay: Sequence[int], branch: int) -> Points:
        """All but those of answers."""
        points = super().boundaries(low, high, replay, branch)
        return [point for point in points if point[1] is not Reason.ANSWER]


class WithoutRetiring(SnapshotPolicy):
    """As in use, but a chat's past snapshots are kept as long as the others."""


POLICIES: dict[str, Callable[[int, int, int], SnapshotPolicy]] = {
    "in use": SnapshotPolicy,
    "past turns kept": WithoutRetiring,
    "answers every 16": lambda size, interval, _: SnapshotPolicy(size, interval, 16),
    "answers every 128": lambda size, interval, _: SnapshotPolicy(size, interval, 128),
    "no answers": WithoutAnswers,
    "no interval": WithoutInterval,
    "interval 256": lambda size, _, answer: SnapshotPolicy(size, 256, answer),
    "interval 1024 only": IntervalOnly,
    "interval 256 only": lambda size, _, answer: IntervalOnly(size, 256, answer),
    "every block": EveryBlock,
    "chunk ends only": ChunkEnds,
}


@contextmanager
def policy(name: str) -> Iterator[None]:
    """Let managers that are made in this context use the policy of this name."""
    retire = mock.patch.object(
        snapshot_manager.SnapshotPool, "retire", snapshot_manager.SnapshotPool.refresh
    )
    with mock.patch.object(snapshot_manager, "SnapshotPolicy", POLICIES[name]):
        if name == "past turns kept":
            with retire:
                yield
        else:
            yield


@contextmanager
def kept_of_answer(count: int) -> Iterator[None]:
    """Let managers keep so many snapshots of an answer, its last ones, while this context lasts."""
    with mock.patch.object(snapshot_manager.SnapshotManager, "_kept_of_answer", count):
        yield
