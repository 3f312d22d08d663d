"""Run the contract tests against another vLLM and print what moved: ``make contract VLLM=...``.

VLLM is a version (its wheel is downloaded, not installed), a wheel, a virtual environment in which vLLM
is installed, or a folder that holds the package ``vllm``. The tests run with this project's Python and
torch, and only the package ``vllm`` replaced: they read its symbols and signatures and compute nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parent.parent
OUT = "VLLM_DUO_CONTRACT"  # environment variable: where the testing process writes its outcomes
BUILD = ROOT / "build" / "contract"

_outcomes: list[dict[str, str]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """As a plugin of the testing process: keep what each test came to."""
    if report.when == "call" or report.outcome != "passed":
        _outcomes.append({"outcome": report.outcome, "message": _message(report)})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """As a plugin: a module of ours that no longer imports."""
    if report.outcome == "failed":
        _outcomes.append({"outcome": "failed", "message": _message(report)})


def pytest_sessionfinish() -> None:
    """As a plugin: write them."""
    if os.environ.get(OUT):
        Path(os.environ[OUT]).write_text(json.dumps(_outcomes))


def _message(report: Any) -> str:
    if report.outcome == "passed":
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:  # of a collection: its last line says what is missing
        lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
        return lines[-1].removeprefix("E").strip() if lines else str(report.longrepr)
    return re.sub(r"^(AssertionError|Failed): ", "", str(crash.message)).split("\nassert ")[0]


def package_folder(where: str) -> Path:
    """A folder that holds the package ``vllm`` and nothing else.

    Raises:
        ValueError: there is no vLLM in what was named.
    """
    path = Path(where).expanduser()
    if path.suffix == ".whl" and path.is_file():
        return _unpacked(path)
    if path.is_dir():
        for found in (path, *sorted(path.glob("lib/python*/site-packages"))):
            if (found / "vllm" / "__init__.py").is_file():
                return _linked(found / "vllm")
        raise ValueError(
            f"VLLM={where}: expected an environment or a folder with the package vllm, found none in "
            "it: name another one"
        )
    if re.fullmatch(r"\d+(\.\w+)+(\+\w+)?", where):
        return _unpacked(_downloaded(where))
    raise ValueError(
        f"VLLM={where}: expected a version, a wheel, an environment or a folder, found no such thing: "
        "for example VLLM=0.33.0"
    )


def _linked(package: Path) -> Path:
    folder = BUILD / "linked"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vllm").unlink(missing_ok=True)
    (folder / "vllm").symlink_to(package.resolve())
    return folder


def version_of(folder: Path) -> str:
    """The version that the package in this folder has written down."""
    file = folder / "vllm" / "_version.py"
    found = (
        re.search(r"^__version__ = .*?['\"](.+?)['\"]", file.read_text(), re.M)
        if file.exists()
        else None
    )
    return found[1] if found else "of unknown version"


def _downloaded(version: str) -> Path:
    folder = BUILD / version
    made = list(folder.glob("vllm-*.whl"))
    if not made:
        print(f"Downloading the wheel of vLLM {version} (some hundred MB) ...", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        wanted = [f"vllm=={version}", "--only-binary", ":all:", "--dest", str(folder)]
        if subprocess.run([*command, *wanted], check=False).returncode:
            raise ValueError(f"VLLM={version}: no wheel of it could be downloaded: name a folder")
        made = list(folder.glob("vllm-*.whl"))
    return made[0]


def _unpacked(wheel: Path) -> Path:
    folder = BUILD / f"{wheel.stem}-sources"
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("vllm/") and n.endswith(".py")]
        if not names:
            raise ValueError(f"VLLM={wheel}: expected a wheel of vLLM, found no package vllm in it")
        archive.extractall(folder, names)
    return folder


def run(folder: Path) -> list[dict[str, str]]:
    """Outcomes of the contract tests over the package ``vllm`` in this folder.

    Raises:
        RuntimeError: pytest itself failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "outcomes.json"
        environment = {
            **os.environ,
            OUT: str(target),
            "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
            # Plugins in this vLLM's entry points, ours among them, may need what has moved.
            "VLLM_PLUGINS": "",
        }
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "tools.contract", "tests/contract"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode not in (0, 1, 2) or not target.exists():
            raise RuntimeError(f"the contract tests did not run:\n{done.stdout}{done.stderr}")
        outcomes: list[dict[str, str]] = json.loads(target.read_text())
        return outcomes


def report(outcomes: Sequence[dict[str, str]]) -> str:
    """What holds and what moved, one line each."""
    moved = list(dict.fromkeys(o["message"] for o in outcomes if o["outcome"] == "failed"))
    held = sum(outcome["outcome"] == "passed" for outcome in outcomes)
    skipped = len(outcomes) - held - sum(o["outcome"] == "failed" for o in outcomes)
    lines = [f"  {message}" for message in moved]
    head = f"{held} of {len(outcomes)} contract tests hold, {skipped} skipped"
    return "\n".join([head, *(["moved:", *lines] if moved else ["nothing moved"])])


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 if nothing moved, 1 if something did, 2 for a bad argument."""
    if len(arguments) != 1 or not arguments[0]:
        print("usage: make contract VLLM=<version, wheel, environment or folder>")
        return 2
    try:
        folder = package_folder(arguments[0])
    except ValueError as error:
        print(error)
        return 2
    outcomes = run(folder)
    print(f"vLLM {version_of(folder)}: {report(outcomes)}")
    return int(any(outcome["outcome"] == "failed" for outcome in outcomes) or not outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
