"""Runs the engines of an evaluation one after the other, each once: its answers stay on disk."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from vllm_duo.evaluate.logs import log_tail


def answers_of(name: str, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The engine's answers: from ``folder`` if this very job was run before, else from a new engine.

    Args:
        name: of the engine, in file names.
        job: as in ``worker.py``.
        folder: keeps the job, the answers and the log.

    Raises:
        RuntimeError: the engine failed; with the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(job, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]
    kept = folder / f"{name}-{key}.answers.json"
    if not kept.exists():
        job_file, log = folder / f"{name}-{key}.job.json", folder / f"{name}-{key}.log"
        job_file.write_text(text)
        part = kept.with_suffix(".part")
        _run(name, job_file, part, log)
        part.replace(kept)
    answers: dict[str, Any] = json.loads(kept.read_text())
    return answers


def _run(name: str, job_file: Path, answers: Path, log: Path) -> None:
    command = [sys.executable, "-m", "vllm_duo.evaluate.worker", str(job_file), str(answers)]
    with log.open("wb") as out:
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, check=False, env=dict(os.environ)
        )
    if done.returncode or not answers.exists():
        raise RuntimeError(
            f"the engine {name!r} ended with exit code {done.returncode}; engines that had answered "
            f"are kept, the same command goes on from there; the end of {log}:\n{log_tail(log)}"
        )
