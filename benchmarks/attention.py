"""Attention with this package's kernels against the best full attention, alternating in one run.

    python -m benchmarks.attention --device cpu --threads 1 2 --out attention.json
    python -m benchmarks.attention --device cuda --out attention.json --plot attention.png

``--help`` after a device lists that device's flags: ``attention_cpu.py`` and ``gpu/main.py``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

MODULES = {"cpu": "benchmarks.attention_cpu", "cuda": "benchmarks.gpu.main"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the device's benchmark.

    Args:
        argv: without the program's name; default: the process's.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    device = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    device.add_argument("--device", choices=list(MODULES), default="cpu")
    chosen, _ = device.parse_known_args(arguments)
    # Only now: where there is no vLLM and no compiled kernel, that of the GPU runs all the same.
    module = importlib.import_module(MODULES[chosen.device])
    code: int = module.main(arguments)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
