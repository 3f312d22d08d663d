"""Runs over the user's own texts: conversations, documents and datasets."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks.serving.runs import NEEDLE, results_of


class TestPromptsThatBeginAlike:
    """Conversations, and questions about the user's documents."""

    FLAGS = (
        "--lengths 256 --output-tokens 4 --requests 8 --concurrencies 2 --rounds 2 "
        "--passkey-share 0.25"
    )

    @pytest.fixture
    def documents(self, tmp_path):
        folder = tmp_path / "documents"
        folder.mkdir()
        words = " ".join(f"the lamp of farmer number {i}" for i in range(300))
        (folder / "a.txt").write_text(words)
        return folder

    @pytest.fixture
    def run(self, bench, documents, tmp_path):
        flags = [*self.FLAGS.split(), "--workloads", "multi-turn", "documents"]
        folder = tmp_path / "run"
        return bench(NEEDLE, *flags, "--documents", documents, "--out", folder), folder

    def test_both_are_measured_on_both_sides(self, run):
        (code, output), folder = run
        assert code == 0, output
        results = results_of(folder)
        assert results.complete
        assert [(p.workload, [(s.side, s.rounds) for s in p.sides]) for p in results.points] == [
            (workload, [("stock", 2), ("duo-0.5", 2)]) for workload in ("multi-turn", "documents")
        ]
        for point in results.points:
            for side in point.sides:
                assert (side.passkeys_right, side.passkeys_asked) == (4, 4)
                assert side.prefix_hit_rate == 0.25
                assert side.ttft_ms.samples == 2 * (8 + 2)

    def test_gate_asks_one_of_each_too(self, run):
        # 4 random texts and 4 pass keys, 4 turns of a conversation, 4 questions about a document.
        assert results_of(run[1]).gate.compared_tokens == (8 + 4 + 4) * 16

    def test_no_round_has_another_ones_prompts(self, run):
        kept = [file.read_text().splitlines() for file in (run[1] / "requests").iterdir()]
        assert len(kept) == 4
        assert len({line for lines in kept for line in lines}) == sum(map(len, kept))

    def test_a_run_goes_on_with_the_requests_it_had(self, run, bench, documents):
        """Although the user's texts have changed: all sides of a round get the same."""
        _, folder = run
        kept = {file: file.read_bytes() for file in (folder / "requests").iterdir()}
        (documents / "a.txt").write_text("other words now " * 1000)
        (lost,) = (folder / "runs").glob("documents-*/duo-0.5-round1.json")
        lost.unlink()
        code, output = bench("--resume", folder)
        assert code == 0, output
        assert results_of(folder).complete
        assert json.loads(lost.read_text())["passkeys_right"] == 2
        assert {file: file.read_bytes() for file in kept} == kept

    def test_too_little_text_is_told_before_any_server_starts(self, bench, documents, tmp_path):
        (documents / "a.txt").write_text("a few words")
        flags = [*self.FLAGS.split(), "--workloads", "documents", "--documents", documents]
        code, output = bench(NEEDLE, *flags, "--out", tmp_path / "run")
        assert code == 2
        assert "tokens of text, for 5 pieces of" in output
        assert not (tmp_path / "run").exists()


class TestDataset:
    """The user's own prompts, in an open loop at several rates and in a closed one."""

    FLAGS = (
        "--workloads dataset --output-tokens 4 --requests 4 --rates 2 50 --concurrencies 2 --rounds 2 "
        "--passkey-share 0.25"
    )

    @pytest.fixture
    def run(self, bench, tmp_path):
        """Runs with lines of a dataset: (exit code, output, folder)."""

        def run(lines):
            file, folder = tmp_path / "own.jsonl", tmp_path / "run"
            file.write_text("\n".join(lines) + "\n")
            flags = [*self.FLAGS.split(), "--dataset", file, "--out", folder]
            return *bench(NEEDLE, *flags), folder

        return run

    def lines(self):
        return [
            json.dumps({"prompt": f"Prompt {n}.", "output_tokens": 3 + n % 2}) for n in range(24)
        ]

    def test_every_line_is_asked_once_on_every_side(self, run):
        code, output, folder = run(self.lines())
        assert code == 0, output
        results = results_of(folder)
        loads = [point.key.removeprefix("dataset-0-4-") for point in results.points]
        assert loads == ["rate2", "rate50", "closed2"]
        asked = []
        for file in (folder / "requests").iterdir():
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            asked += [row["prompt"] for row in rows if not row["answer"]]
        assert sorted(asked) == sorted(f"Prompt {n}." for n in range(24))
        for point in results.points:
            for side in point.sides:
                assert (side.rounds, side.passkeys_asked, side.passkeys_right) == (2, 2, 2)
                # Four of five have 3 or 4 tokens by turns, the pass key 12.
                assert side.itl_ms.samples == 2 * (2 * 2 + 2 * 3 + 11)

    def test_the_clients_load_is_the_points(self, run):
        _, _, folder = run(self.lines())
        for key, flags in {
            "rate2": ["--request-rate", "2.0"],
            "rate50": ["--request-rate", "50.0"],
            "closed2": ["--max-concurrency", "2"],
        }.items():
            files = list((folder / "runs" / f"dataset-0-4-{key}").glob("*-round?.json"))
            assert len(files) == 4
            for file in files:
                command = json.loads(file.read_text())["client_command"]
                at = command.index(flags[0])
                assert command[at : at + 2] == flags
                assert ("--request-rate" in command) != ("--max-concurrency" in command)

    def test_broken_lines_are_told_before_any_server_and_leave_the_folder_free(self, run):
        lines = self.lines()
        code, output, folder = run([*lines[:3], '{"prompt": ', *lines[4:], "[1]"])
        assert code == 2
        assert "own.jsonl: expected one JSON object a line" in output
        assert "got 2 broken lines" in output
        assert "line 4: no JSON" in output
        assert "line 25: an object was expected, got list" in output
        assert not folder.exists()
        assert run(lines)[0] == 0

    def test_too_few_lines(self, run):
        code, output, folder = run(self.lines()[:23])
        assert code == 2
        assert "expected 24 lines, one for each request of 2 rounds of all points" in output
        assert not folder.exists()
