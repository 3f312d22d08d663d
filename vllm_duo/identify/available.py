"""How much memory this process can still take: of the machine, its control groups and its own limits.

A control group's limit ends a process without a word, the limits of ``ulimit`` fail an allocation: both
are looked at before a step is computed.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
"""What version 1 of control groups calls no limit is a little less than 2**63."""


def available_cpu_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes that this process can still take: the least of what each limit leaves.

    None where the kernel tells of no limit at all, as on systems without /proc.

    Args:
        proc: where the kernel tells of processes.
        cgroups: where it tells of control groups, of either version.
    """
    left = [*_left_on_machine(proc), *_left_in_groups(proc, cgroups), *_left_to_process(proc)]
    return max(0, min(left)) if left else None


def _left_on_machine(proc: Path) -> Iterator[int]:
    meminfo = _amounts(proc / "meminfo")
    if "MemAvailable" in meminfo:
        yield meminfo["MemAvailable"]


def _left_to_process(proc: Path) -> Iterator[int]:
    status = _amounts(proc / "self" / "status")
    for kind, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY and used in status:
            yield limit - status[used]


def _left_in_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """Of the process's own group and all above it, as far as this mount shows them."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            roots = [cgroups, cgroups / "unified"]
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            roots = [cgroups / "memory"]
        else:
            continue
        for root in roots:
            group = root / path.strip("/")
            # In a container the path may be the host's, and the root the group itself.
            for folder in (group, *group.parents):
                if folder.is_relative_to(root):
                    yield from _left_in_group(folder, *names)


def _left_in_group(folder: Path, limit: str, used: str, reclaimable: str) -> Iterator[int]:
    """What its limit leaves; files that the kernel would drop from its memory do not count as used."""
    try:
        limited_to = (folder / limit).read_text().strip()
        most = UNLIMITED if limited_to == "max" else int(limited_to)
        taken = int((folder / used).read_text())
        cached = re.search(rf"^{reclaimable} (\d+)$", (folder / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):
        return
    if most < UNLIMITED:
        yield most - taken + (int(cached[1]) if cached else 0)


def _amounts(file: Path) -> dict[str, int]:
    """The amounts of memory in a file of the kernel, in bytes; none where there is no such file."""
    try:
        text = file.read_text()
    except (OSError, ValueError):
        return {}
    found = re.findall(r"^(\w+):\s+(\d+) kB$", text, flags=re.M)
    return {name: int(amount) * 1024 for name, amount in found}
