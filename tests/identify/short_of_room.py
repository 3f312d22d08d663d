"""Runs ``vllm-duo identify`` where disk or memory are short for real, in a process of its own.

    python -m tests.identify.short_of_room FOLDER KIND ...

FOLDER has the tiny models; what happened goes to FOLDER/KIND.json, a list of attempts. Kinds in which
an allocation fails need a malloc that gives back what is freed (MALLOC_MMAP_THRESHOLD_).
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from tests.identify import tiny
from tests.identify.control_group import own_group
from vllm_duo import HeadPattern
from vllm_duo.cli.main import main
from vllm_duo.identify import memory, results, run
from vllm_duo.identify.available import available_cpu_bytes
from vllm_duo.identify.registry import FORWARD_METHODS

MIB = 1 << 20
LONGEST = 4000
ROOM = 12 * MIB
"""More than tokenizing takes, whose library ends the process without memory, and less than a step."""
SMALL = ("--max-length", "96", "--min-length", "80", "--check-samples", "2")
SCORED = ("--method", "on-the-fly", "--samples", "5", "--checkpoint-every", "2", *SMALL)
MANY = ("--steps", "1", "--batch-size", "200", "--max-length", "1000", "--min-length", "900")
"""A step of gates that needs 1.7 GiB: refused, not computed."""


@dataclass
class Attempt:
    """What a run ended with, what it told, and the files that it left."""

    code: int
    told: str
    files: list[str]
    table: str | None


def attempt(model: Path, out: Path, *flags: str) -> Attempt:
    sys.argv = ["vllm-duo", "identify", str(model), "--out", str(out), *flags]
    sys.argv += ["--sink-size", str(tiny.SINK), "--recent-size", str(tiny.RECENT)]
    errors, code = io.StringIO(), 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(errors):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    files = sorted(file.name for file in out.iterdir()) if out.is_dir() else []
    table = out / "full_attention_heads.tsv"
    told = " ".join(errors.getvalue().split())
    return Attempt(code, told, files, table.read_text() if table.exists() else None)


def full_disk(folder: Path) -> list[Attempt]:
    """A tmpfs of a few pages, which is then made larger; in a mount namespace of its own."""
    disk, found = folder / "disk", [attempt(folder / "short", folder / "whole", *SCORED)]
    disk.mkdir()
    # The checkpoints of this run take one page each; the pictures of its results take more.
    for kilobytes, taken in ((4, True), (4, False), (16, False)):
        mount("tmpfs", "-t", "tmpfs", "-o", f"size={kilobytes}k", str(disk))
        if taken:
            (disk / "others").write_bytes(bytes(4096))
        found.append(attempt(folder / "short", disk / "out", *SCORED))
        mount("tmpfs", "-o", "remount,size=1m", str(disk))
        found.append(attempt(folder / "short", disk / "out", *SCORED, "--resume"))
        subprocess.run(["umount", str(disk)], check=True)
    return found


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def file_size(folder: Path) -> list[Attempt]:
    """``ulimit -f`` below a checkpoint's size, and then below that of the results."""
    found = [attempt(folder / "short", folder / "whole", *SCORED)]
    for limit in (100, 3000):
        out = folder / f"out{limit}"
        with limited(resource.RLIMIT_FSIZE, limit):
            found.append(attempt(folder / "short", out, *SCORED))
        found.append(attempt(folder / "short", out, *SCORED, "--resume"))
    return found


def address_space(folder: Path) -> list[Attempt]:
    """``ulimit -v``: estimated not to fit, and then one that allows the same run in small."""
    with limited(resource.RLIMIT_AS, address_space_bytes() + 800 * MIB):
        return [
            attempt(folder / "short", folder / "large", *MANY),
            attempt(folder / "short", folder / "small", *MANY, "--batch-size", "1", *SMALL),
        ]


def allocation(folder: Path) -> list[Attempt]:
    """Memory that was there when a run was estimated, and is not when its first step needs it."""
    found = []
    check = memory.check_fits
    for method in ("gates", *FORWARD_METHODS):
        flags = ["--method", method, "--check-samples", "0"]
        flags += ["--steps", "2"] if method == "gates" else ["--samples", "2"]
        flags += ["--max-length", str(LONGEST), "--min-length", str(LONGEST - 100)]
        with contextlib.ExitStack() as limits:

            def check_and_take(*arguments, limits=limits):
                check(*arguments)
                room = address_space_bytes() + ROOM
                limits.enter_context(limited(resource.RLIMIT_AS, room))

            memory.check_fits = check_and_take
            out = folder / method
            found.append(attempt(folder / "long", out, *flags))
        memory.check_fits = check
        found.append(attempt(folder / "long", out, *as_told(flags, found[-1].told)))
    return found


def as_told(flags: list[str], told: str) -> list[str]:
    """The flags with the values that a message names, and no other change."""
    found = list(flags)
    for name, value in re.findall(r"(--m(?:ax|in)-length) (?:at most )?(\d+)", told):
        found[found.index(name) + 1] = value
    return found


def self_check(folder: Path) -> list[Attempt]:
    """Memory that is gone once the heads are found, saved by the first of two methods alone."""
    source = folder / "source"
    HeadPattern(np.array([[0.9, 0.1], [0.2, 0.3]]), {"method": "gates"}).save(source)
    lengths = ["--max-length", "96", "--min-length", "80", "--check-length", str(LONGEST)]
    check, found = run.check_pattern, []
    for method, resume in (
        (["on-the-fly", "--samples", "2"], ["--resume"]),
        (["exclusive", "--from", str(source)], []),
    ):
        flags, out = ["--method", *method, *lengths], folder / method[0]
        with contextlib.ExitStack() as limits:

            def take_and_check(*arguments, limits=limits, **others):
                limits.enter_context(limited(resource.RLIMIT_AS, address_space_bytes() + ROOM))
                return check(*arguments, **others)

            run.check_pattern = take_and_check
            found.append(attempt(folder / "long", out, *flags))
        run.check_pattern = check
        found.append(attempt(folder / "long", out, *flags, "--check-samples", "0", *resume))
    return found


def control_group(folder: Path) -> list[Attempt]:
    """A limit of the kernel's, which would end the process without a word."""
    with own_group() as limit:
        limit(400 * MIB)
        assert available_cpu_bytes() < 500 * MIB
        return [
            attempt(folder / "short", folder / "large", *MANY),
            attempt(folder / "short", folder / "small", *MANY, "--batch-size", "1", *SMALL),
        ]


@contextlib.contextmanager
def limited(kind: int, amount: int):
    """The soft limit alone, so that it can be lifted again."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (amount, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def address_space_bytes() -> int:
    gc.collect()  # what earlier runs left, which would make room later
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmSize" in x)
    return int(line.split()[1]) * 1024


def load_libraries() -> None:
    """All that a run imports, so that limits meet what it computes alone."""
    results.check_can_draw()
    model = tiny.random_llama()
    model(torch.ones(1, 64, dtype=torch.long)).logits.sum().backward()


KINDS = {
    "full-disk": full_disk,
    "file-size": file_size,
    "address-space": address_space,
    "allocation": allocation,
    "self-check": self_check,
    "control-group": control_group,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    load_libraries()
    folder, *kinds = sys.argv[1:]
    for kind in kinds:
        where = Path(folder, kind)
        shutil.copytree(Path(folder, "models"), where)
        found = KINDS[kind](where)
        Path(folder, f"{kind}.json").write_text(json.dumps([asdict(one) for one in found]))
