"""Keeps a folder of files below a number of bytes: the least recently used go first."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_duo.kv_transfer.store import TEMPORARY

OLD_SECONDS = 3600
"""A temporary file of that age belongs to no process any more."""
RESCAN = 16
"""The folder is looked at again once a 16th of the limit was written: others may write there too."""
ROOM = 0.95
"""Down to which share of the limit files are removed, so that it is not done for every file."""
_SERVER = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(r"[0-9a-f]{2}")
_NAME = re.compile(rf"[0-9a-f]{{64}}\.(?:page|ring)(\..*{re.escape(TEMPORARY)})?")


@dataclass(frozen=True, slots=True)
class _Entry:
    used_ns: int
    num_bytes: int
    path: str


class Budget:
    """Counts what lies in a folder, and makes room in it.

    Args:
        root: the folder; only files that a ``Store`` has named are counted and removed.
        max_bytes: of them together.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._used = 0
        self._written: float = float("inf")  # since the last look

    def make_room(self, num_bytes: int) -> bool:
        """Remove the least recently used files until ``num_bytes`` more fit.

        With one server the files never have more than ``max_bytes``; each further one that writes to
        the folder may be a 16th of that ahead of what the others know.

        Returns:
            False if they would not fit in an empty folder.

        Raises:
            OSError: a file cannot be removed.
        """
        if num_bytes > self.max_bytes:
            return False
        if self._used + num_bytes > self.max_bytes or self._written > self.max_bytes / RESCAN:
            self._look(num_bytes)
        self._used += num_bytes
        self._written += num_bytes
        return True

    def _look(self, num_bytes: int) -> None:
        entries = sorted(self._entries(), key=lambda entry: entry.used_ns)
        used = sum(entry.num_bytes for entry in entries)
        if used + num_bytes > self.max_bytes:
            goal = max(self.max_bytes * ROOM - num_bytes, 0)
            for entry in entries:
                if used <= goal:
                    break
                Path(entry.path).unlink(missing_ok=True)
                used -= entry.num_bytes
        self._used, self._written = used, 0

    def _entries(self) -> Iterator[_Entry]:
        """Every stored file; abandoned temporary ones are removed. Nothing else is looked at."""
        oldest = time.time_ns() - OLD_SECONDS * 10**9
        for server in _folders(self.root, _SERVER):
            for folder in _folders(server, _SHARD):
                for found in os.scandir(folder):
                    if (match := _NAME.fullmatch(found.name)) is None:
                        continue
                    try:
                        status = found.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if match[1] and status.st_mtime_ns < oldest:
                        Path(found.path).unlink(missing_ok=True)
                    else:
                        yield _Entry(status.st_mtime_ns, status.st_size, found.path)


def _folders(path: str | Path, name: re.Pattern[str]) -> Iterator[str]:
    with os.scandir(path) as found:
        yield from (each.path for each in found if name.fullmatch(each.name))
