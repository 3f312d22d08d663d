"""Input that is refused, and what is left of its run folder."""

from __future__ import annotations

import json
import socket

import pytest

from tests.benchmarks.serving.runs import NEEDLE


class TestBadInput:
    def test_port_taken(self, new_run):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            code, output, _ = new_run("--port", str(port))
        assert code == 2
        assert (
            f"expected a free TCP port {port} for the server stock, got one that is taken" in output
        )

    def test_folder_with_files(self, new_run, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "notes.txt").write_text("")
        code, output, _ = new_run()
        assert code == 2
        assert "expected a new or an empty folder, found files" in output

    def test_resuming_an_empty_folder(self, bench, tmp_path):
        code, output = bench("--resume", tmp_path)
        assert code == 2
        assert "expected the folder of a run with settings.json, found none" in output

    def test_resuming_with_other_settings(self, bench, tmp_path, new_run):
        _, _, folder = new_run(env=["FAKE_NO_START=duo"])
        code, output = bench("--resume", folder, "--seed", "5", "--rounds", "2")
        assert code == 2
        assert "(seed: 0 there, 5 given)" in output

    def test_resuming_on_another_machine(self, bench, new_run):
        _, _, folder = new_run(env=["FAKE_NO_START=duo"])
        file = folder / "versions.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"cpu": "Another"}))
        code, output = bench("--resume", folder)
        assert code == 2
        assert "(cpu: 'Another' there," in output

    def test_prompts_longer_than_the_server_takes(self, new_run):
        code, output, _ = new_run("--lengths", "2046")
        assert code == 2
        assert "expected at most 2048 tokens" in output
        assert "got 2046 + 4" in output

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--workloads documents", "'documents' and --documents DIR go together"),
            ("--sparsity 0.5 0.5", "each sparsity can be measured once, got twice: 0.5"),
            ("--sparsity 1.5", "sparsities.0: Input should be less than or equal to 1, got 1.5"),
            ("--workloads multi-turn --rates 1", "expected at least one point, got none"),
            ("--workloads multi-turn --requests 8", "at least 4 requests for each one in flight"),
            ("--requests 1 2 3", "expected one number, or one for each of the 1 lengths, got 3"),
            ("--requests 0", "requests: Input should be greater than or equal to 1, got 0"),
            ("--env WRONG", "--env: expected NAME=VALUE, got 'WRONG'"),
        ],
    )
    def test_flags(self, bench, tmp_path, flags, message):
        code, output = bench(NEEDLE, *flags.split(), "--out", tmp_path / "run")
        assert code == 2
        assert message in " ".join(output.split())
        assert not (tmp_path / "run").exists()

    def test_neither_out_nor_resume(self, bench):
        code, output = bench(NEEDLE)
        assert code == 2
        assert "expected --out DIR for a new run or --resume DIR" in output
