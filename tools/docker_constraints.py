"""Write docker/constraints-cpu.txt: the versions of all that the CPU image installs, as they are here.

The image then runs what the test suite ran. ``python tools/docker_constraints.py`` after an upgrade.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docker" / "constraints-cpu.txt"
OWN = ("vllm-duo", "vllm")  # built from the checkout


def closure(name: str, extras: frozenset[str]) -> dict[str, str]:
    """Installed versions of a distribution and of all that it needs here, by canonical name."""
    versions: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    todo = [(canonicalize_name(name), extras)]
    while todo:
        each = todo.pop()
        if each in seen:
            continue
        seen.add(each)
        try:
            distribution = importlib.metadata.distribution(each[0])
        except importlib.metadata.PackageNotFoundError:
            continue  # left out on purpose: tools/cpu-overrides.txt
        versions[each[0]] = distribution.version
        for line in distribution.requires or ():
            wanted = Requirement(line)
            marker = wanted.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in each[1] | {""}):
                todo.append((canonicalize_name(wanted.name), frozenset(wanted.extras)))
    return versions


def render() -> str:
    """The file's text."""
    found = closure("vllm-duo", frozenset({"cpu"}))
    lines = [f"{name}=={version}" for name, version in sorted(found.items()) if name not in OWN]
    head = "# Written by tools/docker_constraints.py: the versions that the test suite ran with."
    return "\n".join([head, *lines]) + "\n"


def main() -> int:
    """Write the file."""
    FILE.write_text(render())
    print(f"wrote {FILE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
