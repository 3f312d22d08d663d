"""Runs the command line in this process."""

from __future__ import annotations

import sys

import pytest

from vllm_duo.cli import main as cli


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a command line: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vllm-duo", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return (caught.value.code or 0, *capfd.readouterr())

    return run
