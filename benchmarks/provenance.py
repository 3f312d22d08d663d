"""Where a measurement was taken: versions and hardware, for every JSON file of results."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def provenance() -> dict[str, str | int]:
    """Versions, processor, cores and the command that was run."""
    import vllm

    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "command": f"python -m benchmarks.{Path(sys.argv[0]).stem} {shlex.join(sys.argv[1:])}",
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "vllm": vllm.__version__,
        "torch": version("torch"),
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.processor(),
        "cores": os.cpu_count() or 0,
        "gpu": _gpu(),
    }


def lscpu() -> str:
    """What ``lscpu`` prints."""
    return subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout


def _gpu() -> str:
    """Names of the NVIDIA GPUs; "none" without one."""
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return "none"
    return ", ".join(told.stdout.split("\n")).strip(", ") or "none"
