"""Finds the results that a report is made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_duo.heads.folder import TSV_NAME, read_folder

Kind = Literal["eval", "pattern", "plan", "serve"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """One file of results.

    Attributes:
        file: where it was read.
        kind: what made it.
        data: its contents; of a pattern, which is a table, its config.json as ``settings``.
    """

    file: Path
    kind: Kind
    data: dict[str, Any]


def load_results(runs: Sequence[Path]) -> list[Result]:
    """Read files, and of folders the head pattern and every JSON file at the top that holds results.

    Raises:
        ValueError: a file is missing, broken or of another kind; a folder has no results.
    """
    return [result for run in runs for result in _load(run)]


def _load(run: Path) -> list[Result]:
    if run.is_dir():
        found = [_read(file) for file in sorted(run.glob("*.json"))]
        known = [result for result in found if result is not None]
        if (run / TSV_NAME).is_file():
            config = read_folder(run)[1]
            known.insert(0, Result(file=run / TSV_NAME, kind="pattern", data={"settings": config}))
        if not known:
            raise ValueError(
                f"{run}: expected a folder with results of vllm-duo eval, of plan --json or of "
                f"benchmarks.serve (*.json), or with a head pattern ({TSV_NAME}), found {len(found)} "
                "JSON files, none of them results: name another folder"
            )
        return known
    if not run.is_file():
        raise ValueError(f"{run}: expected a file or folder of results, found nothing: correct it")
    result = _read(run)
    if result is None:
        raise ValueError(
            f"{run}: expected results of vllm-duo eval, of plan --json or of benchmarks.serve, got "
            "another JSON document: name another file"
        )
    return [result]


def _read(file: Path) -> Result | None:
    """The results in a file; None where it holds something else."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON or UTF-8
        raise ValueError(
            f"{file}: expected JSON, got text that does not parse ({error}): run the command again"
        ) from None
    if not isinstance(data, dict) or data.get("schema_version") != 1:
        return None
    if data.get("kind") == "eval" and {"tasks", "settings"} <= data.keys():
        return Result(file=file, kind="eval", data=data)
    if data.get("kind") == "serve" and {"points", "gate"} <= data.keys():
        return Result(file=file, kind="serve", data=data)
    if {"by_length", "full", "times_full_attention"} <= data.keys():
        return Result(file=file, kind="plan", data=data)
    return None
