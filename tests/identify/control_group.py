"""A control group of a process's own, whose memory a test may limit.

    python -m tests.identify.control_group

ends with 0 where this process may have one; it imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
FILES = {
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
"""Limit and use, by the controllers that a line of /proc/self/cgroup names: version 2, version 1."""


@contextlib.contextmanager
def own_group(
    cgroups: Path = CGROUPS, of_process: Path = Path("/proc/self/cgroup")
) -> Iterator[Callable[[int], None]]:
    """This process in a control group below its own; gives what limits it to so many bytes more.

    Raises:
        OSError: it may not have one, or one without a limit.
    """
    above, limit_name, use_name = find_group(cgroups, of_process)
    own = above / f"duo-{os.getpid()}"
    own.mkdir()
    try:
        # Version 2 gives a group these files only where the one above hands the controller down.
        for name in (limit_name, use_name):
            if not (own / name).exists():
                raise FileNotFoundError(f"{own} has no {name}: memory is not handed down to it")
        try:
            (own / "cgroup.procs").write_text(str(os.getpid()))

            def limit(more: int) -> None:
                # Pages that were charged to the group above stay there.
                (own / limit_name).write_text(str(int((own / use_name).read_text()) + more))

            yield limit
        finally:
            (above / "cgroup.procs").write_text(str(os.getpid()))
    finally:
        own.rmdir()


def find_group(cgroups: Path, of_process: Path) -> tuple[Path, str, str]:
    """The group of this process that counts its memory, and the names of its two files."""
    for line in of_process.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in FILES:
            group = cgroups / controllers / path.strip("/")
            if (group / FILES[controllers][1]).exists():
                return group, *FILES[controllers]
    raise FileNotFoundError("no control group for memory")


if __name__ == "__main__":
    with own_group() as limit:
        limit(1 << 30)
