"""What is no count or no share ends a benchmark with a usage error before it runs."""

import sys

import pytest

from benchmarks import prefix_simulated, scheduler

COUNT = "expected a whole number from 1, got"
SHARE = "expected a share from 0 to 1, got"


@pytest.mark.parametrize(
    ("benchmark", "arguments", "message"),
    [
        (prefix_simulated, ["--seeds", "0"], f"--seeds: {COUNT} 0"),
        (scheduler, ["--tokens", "1000", "-1"], f"--tokens: {COUNT} -1"),
        (scheduler, ["--steps", "many"], f"--steps: {COUNT} many"),
        (scheduler, ["--sparsity", "nan"], f"--sparsity: {SHARE} nan"),
        (scheduler, ["--sparsity", "half"], f"--sparsity: {SHARE} half"),
    ],
)
def test_usage(benchmark, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    with pytest.raises(SystemExit) as caught:
        benchmark.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
