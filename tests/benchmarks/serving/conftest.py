"""Runs of ``benchmarks.serve`` with the fake vLLM."""

from __future__ import annotations

import pytest

from benchmarks import serve
from tests.benchmarks.serving.fake_run import FAKE, FLAGS
from tests.benchmarks.serving.runs import NEEDLE


@pytest.fixture
def bench(tmp_path, capfd):
    """Runs the command with the fake vLLM: (exit code, stdout + stderr)."""

    def bench(*arguments, env=()):
        variables = [x for pair in env for x in ("--env", pair)]
        code = serve.main([*map(str, arguments), *variables], vllm=FAKE)
        return code, "".join(capfd.readouterr())

    return bench


@pytest.fixture
def new_run(bench, tmp_path):
    def new_run(*more, env=()):
        return *bench(NEEDLE, *FLAGS.split(), *more, "--out", tmp_path / "run", env=env), (
            tmp_path / "run"
        )

    return new_run
