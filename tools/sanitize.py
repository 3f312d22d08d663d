"""Build the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and run the operator tests.

    python tools/sanitize.py [arguments for pytest]

The instrumented module lives in build/sanitize; as a pytest plugin this file puts it in the place of
the installed one. Python itself is not instrumented, so the sanitizers' libraries are preloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "build" / "sanitize"
FLAG = "VLLM_DUO_SANITIZED_MODULE"


def main() -> int:
    """Build, then test; pytest's exit status."""
    build = [
        *(str(ROOT / ".venv/bin/uv"), "pip", "install", "--python", sys.executable),
        *("--target", str(TARGET), "--no-deps", "--reinstall", "--no-cache"),
        *("--config-setting", "cmake.define.DUO_SANITIZE=ON", "--config-setting"),
        *("install.strip=false", str(ROOT)),
    ]
    subprocess.run(build, check=True)
    module = next((TARGET / "vllm_duo").glob("_cpu.*.so"))
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        FLAG: str(module),
        "LD_PRELOAD": " ".join(libraries),
        # Python frees little at its end; torch's allocator pads what it hands out.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), str(ROOT)]),
    }
    command = [sys.executable, "-m", "pytest", "-p", "sanitize", "-p", "no:cacheprovider", "-q"]
    command += sys.argv[1:] or ["tests/ops", "-k", "not reference and not triton"]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if FLAG in os.environ:
    _spec = spec_from_file_location("vllm_duo._cpu", os.environ[FLAG])
    assert _spec is not None
    assert _spec.loader is not None
    _module = module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    sys.modules["vllm_duo._cpu"] = _module

if __name__ == "__main__":
    raise SystemExit(main())
