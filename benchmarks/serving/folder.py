"""A run folder: settings, servers' logs, requests, raw samples, and what is finished.

::

    settings.json            what is measured
    versions.json            where: versions and hardware
    gate.json                the correctness gate, once it was run
    results.json             all figures, rewritten after every run (vllm_duo/report/serve_results.py)
    servers/SIDE-startN.log
    requests/POINT-roundN.jsonl       the client's dataset, the same for all sides
    runs/POINT/SIDE-roundN.json       figures of one run
    runs/POINT/SIDE-roundN.client.json, .client.log    of vllm bench serve, raw samples included
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from benchmarks.serving.settings import Point, Settings
from vllm_duo.report.serve_results import Gate, Run, ServedSide, ServeResults

SAME_VERSIONS = ("commit", "vllm", "torch", "python", "cpu", "cores", "gpu")
"""What may not change within one run folder; the command may."""

BEFORE_SERVERS = ("settings.json", "versions.json", "requests", "model")
"""What a run writes before it starts a server."""


@dataclass
class RunFolder:
    """Paths and files of one run.

    Attributes:
        path: the folder.
        begun: whether ``create`` began it, rather than a run before.
        made: folders that ``create`` made, the innermost first.
    """

    path: Path
    begun: bool = field(default=False, init=False)
    made: list[Path] = field(default_factory=list, init=False)

    @property
    def logs(self) -> Path:
        """The servers' logs."""
        return self.path / "servers"

    def requests(self, point: Point, round_: int) -> Path:
        """The client's dataset."""
        return self.path / "requests" / f"{point.key}-round{round_}.jsonl"

    def run(self, point: str, side: str, round_: int) -> Path:
        """Figures of one run."""
        return self.path / "runs" / point / f"{side}-round{round_}.json"

    def relative(self, file: Path) -> str:
        """As it stands in results."""
        return file.relative_to(self.path).as_posix()

    def create(self, settings: Settings, versions: dict[str, Any]) -> None:
        """Begin a run in a new or empty folder.

        Raises:
            ValueError: there is something in it.
            OSError: it cannot be written; it is left as it was.
        """
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ValueError(
                f"--out {self.path}: expected a new or an empty folder, found files: name another, or "
                f"go on with what is there with --resume {self.path}"
            )
        self.begun = True
        self.made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _write(self.path / "settings.json", settings.model_dump_json(indent=1))
            _write(self.path / "versions.json", json.dumps(versions, indent=1))
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Undo ``create`` and what followed, unless a server was started: the folder is free again.

        Only what the run wrote is removed, and the folder only if ``create`` made it. What cannot be
        removed stays, without a word: this is called while an error is on its way, which says more.
        """
        if not self.begun or self.logs.exists():
            return
        for name in BEFORE_SERVERS:
            file = self.path / name
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            else:
                for written in (file, _part(file)):
                    with suppress(OSError):
                        written.unlink()
        with suppress(OSError):
            for folder in self.made:
                folder.rmdir()

    def settings(self) -> Settings:
        """The settings of the run that is there.

        Raises:
            ValueError: none is there, or they are broken.
        """
        file = self.path / "settings.json"
        if not file.is_file():
            raise ValueError(
                f"--resume {self.path}: expected the folder of a run with settings.json, found none: "
                "begin a run there with --out"
            )
        try:
            return Settings.model_validate_json(file.read_text())
        except ValidationError as error:
            raise ValueError(
                f"{file}: expected the settings of this program's version, got others: begin a new "
                f"run\n{error}"
            ) from None

    def refuse_other_versions(self, versions: dict[str, Any]) -> None:
        """Figures of two machines or versions don't belong in one run.

        Raises:
            ValueError: what differs.
        """
        kept = json.loads((self.path / "versions.json").read_text())
        differing = [
            f"{name}: {kept.get(name)!r} there, {versions.get(name)!r} here"
            for name in SAME_VERSIONS
            if kept.get(name) != versions.get(name)
        ]
        if differing:
            raise ValueError(
                f"--resume {self.path}: expected the versions and the hardware of its run, got others "
                f"({'; '.join(differing)}): begin a new run with --out"
            )

    def versions(self) -> dict[str, Any]:
        """Of the run that is there."""
        kept: dict[str, Any] = json.loads((self.path / "versions.json").read_text())
        return kept

    def gate(self) -> Gate | None:
        """The gate, if it was run and is green."""
        file = self.path / "gate.json"
        if not file.is_file():
            return None
        gate = Gate.model_validate_json(file.read_text())
        return gate if gate.passed else None

    def save_gate(self, gate: Gate) -> None:
        """Keep it."""
        _write(self.path / "gate.json", gate.model_dump_json(indent=1))

    def save_side(self, side: ServedSide) -> None:
        """Keep what a server said at start."""
        _write(self.logs / f"{side.side}.json", side.model_dump_json(indent=1))

    def sides(self, settings: Settings) -> list[ServedSide]:
        """What the servers said at their latest start."""
        files = [self.logs / f"{side}.json" for side in settings.sides]
        return [ServedSide.model_validate_json(f.read_text()) for f in files if f.is_file()]

    def save_run(self, run: Run) -> None:
        """Keep the figures of one run: it is finished."""
        _write(self.run(run.point, run.side, run.round), run.model_dump_json(indent=1))

    def finished(self, settings: Settings) -> list[Run]:
        """All runs that are in, in the order of points, sides and rounds."""
        files = (
            self.run(point.key, side, round_)
            for point in settings.points
            for side in settings.sides
            for round_ in range(settings.rounds)
        )
        return [Run.model_validate_json(file.read_text()) for file in files if file.is_file()]

    def save_results(self, results: ServeResults) -> None:
        """Write what the report reads."""
        _write(self.path / "results.json", results.model_dump_json(indent=1))


def refuse_other_settings(kept: Settings, given: dict[str, Any], folder: Path) -> None:
    """Compare what the command line says with a run's settings.

    Args:
        kept: of the run.
        given: the settings that were given, and nothing else.
        folder: of the run.

    Raises:
        ValueError: what differs.
    """
    there = kept.model_dump()
    differing = [
        f"{name}: {there[name]!r} there, {value!r} given"
        for name, value in given.items()
        if there[name] != value
    ]
    if differing:
        raise ValueError(
            f"--resume {folder}: expected its own settings, got others ({'; '.join(differing)}): leave "
            "them out, or begin a new run with --out"
        )


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = _part(file)
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(file)


def _part(file: Path) -> Path:
    """A file's name until it is whole."""
    return file.with_name(file.name + ".part")
