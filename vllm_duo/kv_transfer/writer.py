"""Writes files in a thread of its own, so that no request waits for a disk."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_duo.kv_transfer.budget import Budget
from vllm_duo.kv_transfer.store import HEADER_BYTES, Key, Store
from vllm_duo.logging import get_logger

logger = get_logger(__name__)

MAX_WAITING_BYTES = 1 << 29
"""Bytes that may wait to be written; what is saved beyond is dropped, and stored another time."""
CLOSE_SECONDS = 60.0
PAUSE_SECONDS = 60.0
"""After a failure nothing is written for so long."""


@dataclass(frozen=True, slots=True)
class _Task:
    key: Key
    parts: Sequence[memoryview]
    when_ns: int

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class Writer:
    """A queue of files, and the thread that writes them.

    Args:
        store: where they go.
        budget: bytes that they may have.
    """

    def __init__(self, store: Store, budget: Budget) -> None:
        self.store = store
        self.budget = budget
        self._tasks: deque[_Task] = deque()
        self._waiting: set[Key] = set()
        self._waiting_bytes = 0
        self._changed = threading.Condition()
        self._paused_until = 0.0
        self._told = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="duo-storage", daemon=True)
        self._thread.start()

    def wants(self, key: Key, num_bytes: int) -> bool:
        """Whether a file should be handed over: it does not wait already and there is room."""
        with self._changed:
            room = not self._waiting or self._waiting_bytes + num_bytes <= MAX_WAITING_BYTES
            return room and key not in self._waiting and time.monotonic() >= self._paused_until

    def submit(self, key: Key, parts: Sequence[memoryview], when_ns: int) -> None:
        """Queue a file.

        Args:
            key: which.
            parts: of its payload; they must not change any more.
            when_ns: when it was last used.
        """
        task = _Task(key, parts, when_ns)
        with self._changed:
            self._tasks.append(task)
            self._waiting.add(key)
            self._waiting_bytes += task.num_bytes
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all that was queued is written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)

    def close(self) -> None:
        """Write what is queued and end the thread, for a minute at most; safe to call again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._closed)
                if not self._tasks:
                    return
                task = self._tasks.popleft()
            self._write(task)
            with self._changed:
                self._waiting.discard(task.key)
                self._waiting_bytes -= task.num_bytes
                self._changed.notify_all()

    def _write(self, task: _Task) -> None:
        if time.monotonic() < self._paused_until:
            return
        try:
            if self.budget.make_room(task.num_bytes + HEADER_BYTES):
                self.store.write(task.key, task.parts, task.when_ns)
                return
            reason: object = (
                f"a file of {task.num_bytes} bytes does not fit max_bytes {self.budget.max_bytes}"
            )
        except Exception as error:  # whatever it is, the thread goes on and somebody is told
            reason = error
        self._paused_until = time.monotonic() + PAUSE_SECONDS
        if not self._told:
            self._told = True
            logger.warning(
                "duo: nothing is stored in %s: %s. Answers stay right; it is tried again every %d "
                "seconds. Further failures are not told of.",
                self.store.root,
                reason,
                PAUSE_SECONDS,
            )
