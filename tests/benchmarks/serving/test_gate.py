"""Wrong answers: nothing is measured."""

from __future__ import annotations

import pytest

from tests.benchmarks.serving.runs import results_of
from vllm_duo.report.load import load_results
from vllm_duo.report.render import render


class TestGate:
    def test_other_tokens_and_lost_keys_stop_it(self, new_run):
        code, output, folder = new_run(env=["FAKE_WRONG=duo"])
        assert code == 1
        assert "expected stock's token 5, got 7" in output
        assert "duo-0.5: expected the 4 pass keys that stock finds, got 4 of them wrong" in output
        assert results_of(folder).points == []
        assert not (folder / "runs").exists()

    def test_near_ties_pass_where_they_are_allowed(self, new_run):
        code, _, folder = new_run("--gate-tie-nats", "0.06", env=["FAKE_WRONG=duo"])
        gate = results_of(folder).gate
        assert code == 1  # for the pass keys
        assert gate.differences == []
        assert gate.near_ties == 8

    def test_red_gate_is_run_again(self, new_run, bench):
        _, _, folder = new_run(env=["FAKE_WRONG=duo"])
        code, output = bench("--resume", folder)
        assert code == 1
        assert "the correctness gate is red" in output

    def test_report_refuses_a_red_gate(self, new_run):
        _, _, folder = new_run(env=["FAKE_WRONG=duo"])
        with pytest.raises(ValueError, match=r"found none \(its correctness gate is red\)"):
            render(load_results([folder]))

    def test_a_model_that_finds_no_keys_is_not_judged(self, new_run):
        code, _, folder = new_run("--passkey-share", "0.5", env=["FAKE_WRONG=stock"])
        assert code == 1  # the tokens differ
        assert not results_of(folder).gate.judges_passkeys
