"""``make contract``: another vLLM's sources, and what moved in them."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import vllm

from tools import contract

PACKAGE = Path(vllm.__file__).parent


@pytest.fixture(autouse=True)
def build_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(contract, "BUILD", tmp_path / "build")


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """The installed vLLM, linked file by file, with one class renamed and one argument gone."""
    environment = tmp_path_factory.mktemp("environment")
    folder = environment / "lib" / "python3.11" / "site-packages" / "vllm"
    for path, _, files in os.walk(PACKAGE):
        into = folder / Path(path).relative_to(PACKAGE)
        into.mkdir(parents=True)
        for name in files:
            (into / name).symlink_to(Path(path) / name)
    edit(folder / "v1" / "metrics" / "loggers.py", "class StatLoggerManager", "class LoggerManager")
    edit(folder / "v1" / "core" / "block_pool.py", "def get_new_blocks(", "def take_blocks(")
    return environment


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.unlink()
    file.write_text(text.replace(old, new))


def test_what_moved_is_named_with_the_file_that_leans_on_it(changed, capsys):
    assert contract.main([str(changed)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith(f"vLLM {contract.version_of(PACKAGE.parent)}: ")
    assert "contract tests hold" in printed
    assert "vllm.v1.metrics.loggers:StatLoggerManager" in printed
    assert "get_new_blocks" in printed
    assert "vllm_duo/compat/stat_loggers.py" in printed


class TestReport:
    def test_nothing_moved(self):
        outcomes = [{"outcome": "passed", "message": ""}, {"outcome": "skipped", "message": "x"}]
        assert contract.report(outcomes) == "1 of 2 contract tests hold, 1 skipped\nnothing moved"

    def test_one_line_for_what_two_tests_say(self):
        outcomes = [{"outcome": "failed", "message": "a:b is gone"}] * 2
        assert contract.report(outcomes).splitlines() == [
            "0 of 2 contract tests hold, 0 skipped",
            "moved:",
            "  a:b is gone",
        ]


class TestWhere:
    def test_a_folder_with_the_package(self):
        assert (
            contract.package_folder(str(PACKAGE.parent)) / "vllm"
        ).resolve() == PACKAGE.resolve()

    def test_a_wheel(self, tmp_path):
        wheel = tmp_path / "vllm-9.9-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("vllm/__init__.py", "")
            archive.writestr("vllm/_C.so", "")
        folder = contract.package_folder(str(wheel))
        assert [file.name for file in folder.rglob("*.*")] == ["__init__.py"]

    @pytest.mark.parametrize("where", ["no/such/folder", "latest", "tests"])
    def test_nothing_there(self, where, capsys):
        assert contract.main([where]) == 2
        assert f"VLLM={where}: expected" in capsys.readouterr().out

    def test_nothing_asked_for(self, capsys):
        assert contract.main([""]) == 2
        assert "usage: make contract VLLM=" in capsys.readouterr().out
