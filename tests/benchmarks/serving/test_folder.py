"""A run that is refused before any server starts leaves its folder as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.serving.folder import RunFolder
from benchmarks.serving.presets import PRESETS, two_core
from benchmarks.serving.settings import Point, Settings
from tests.benchmarks.serving.runs import NEEDLE


@pytest.fixture
def refused(bench, tmp_path):
    """Runs with a broken dataset in a folder."""

    def refused(folder: Path) -> None:
        broken = tmp_path / "broken.jsonl"
        broken.write_text("[1]\n")
        code, output = bench(
            NEEDLE,
            "--workloads",
            "dataset",
            "--dataset",
            broken,
            "--out",
            folder,
            *("--rates", "1"),
        )
        assert (code, "broken.jsonl: expected one JSON object a line" in output) == (2, True), (
            output
        )

    return refused


def test_an_empty_folder_of_the_users_stays(refused, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    refused(folder)
    assert list(folder.iterdir()) == []
    refused(folder)  # and may be named again


def test_a_link_to_a_folder_stays_and_the_refusal_is_told(refused, tmp_path):
    folder, link = tmp_path / "mine", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    refused(link)
    assert link.is_symlink()
    assert list(folder.iterdir()) == []


def test_folders_that_were_made_go_with_their_parents(refused, tmp_path):
    refused(tmp_path / "new" / "newer" / "run")
    assert not (tmp_path / "new").exists()


class TestDiscard:
    @pytest.fixture
    def folder(self, tmp_path):
        folder = RunFolder(tmp_path / "new" / "run")
        point = Point(
            workload="random", prompt_tokens=64, output_tokens=4, requests=4, concurrency=1
        )
        folder.create(Settings(model="m", points=(point,)), {})
        for name in ("requests", "model"):
            (folder.path / name).mkdir()
            (folder.path / name / "file").write_text("")
        return folder

    def test_files_of_others_stay(self, folder):
        (folder.path / "notes.txt").write_text("mine")
        folder.discard()
        assert [file.name for file in folder.path.iterdir()] == ["notes.txt"]

    def test_what_a_server_has_seen_stays(self, folder):
        folder.logs.mkdir()
        before = sorted(folder.path.rglob("*"))
        folder.discard()
        assert sorted(folder.path.rglob("*")) == before

    def test_a_run_to_go_on_with_stays(self, folder):
        before = sorted(folder.path.rglob("*"))
        RunFolder(folder.path).discard()
        assert sorted(folder.path.rglob("*")) == before

    def test_a_folder_that_cannot_be_written_is_left_as_it_was(self, folder, monkeypatch):
        def full(self, *arguments, **more):
            raise OSError(28, "No space left on device")

        other = RunFolder(folder.path.parent / "other" / "run")
        settings = folder.settings()
        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            other.create(settings, {})
        assert not (folder.path.parent / "other").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_model_that_could_not_be_made_whole(bench, tmp_path, monkeypatch, error):
    def fail(folder: Path) -> Path:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise error

    monkeypatch.setitem(PRESETS, "two-core", lambda: replace(two_core(), prepare=fail))
    folder = tmp_path / "run"
    code, output = bench("--preset", "two-core", "--out", folder)
    assert code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert ("No space left on device" in output) == isinstance(error, OSError)
    assert "--resume" not in output
    assert not folder.exists()
