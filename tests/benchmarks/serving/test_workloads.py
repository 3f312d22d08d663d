"""The requests: lengths, what they share, pass keys among them, and the user's own files."""

from __future__ import annotations

import json
import random
from itertools import pairwise, takewhile
from pathlib import Path

import pytest

from benchmarks.serving.prompts import Texts, read_documents
from benchmarks.serving.settings import TURNS, Point, Settings
from benchmarks.serving.workloads import (
    PER_PREFIX,
    SHARED_SHARE,
    make_requests,
    read_dataset,
    shared_prompts,
)
from vllm_duo.evaluate.passkey import first_number

NEEDLE = str(Path(__file__).resolve().parents[3] / "models" / "needle")
TEXTS = Texts(NEEDLE)


def requests_of(workload, *, round_=0, seed=0, share=0.0, requests=8, tokens=256, rounds=1, **more):
    point = Point(
        workload=workload,
        prompt_tokens=tokens,
        output_tokens=9,
        requests=requests,
        concurrency=2,
    )
    settings = Settings(
        model=NEEDLE, points=(point,), seed=seed, passkey_share=share, rounds=rounds, **more
    )
    made = make_requests(settings, point, round_, TEXTS)
    assert made
    return made


@pytest.mark.parametrize("workload", ["shared-prefix", "multi-turn"])
def test_the_gates_prompts_begin_alike(workload):
    point = Point(workload=workload, prompt_tokens=256, output_tokens=1, requests=4, concurrency=1)
    settings = Settings(model=NEEDLE, points=(point,))
    prompts = shared_prompts(settings, workload, 256, TEXTS, random.Random(0))
    assert len(prompts) == 4
    shortest = min(map(TEXTS.count, prompts))
    assert TEXTS.count(common_start(prompts)) >= min(SHARED_SHARE * 256, shortest - 1)
    assert shared_prompts(settings, "random", 256, TEXTS, random.Random(0)) == []


def beginning(prompt: str) -> str:
    """Of a prompt of documents: a few tokens of its piece."""
    return prompt.partition("\n\nQuestion")[0][:16]


def common_start(prompts):
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*prompts, strict=False))
    return "".join(letters[0] for letters in same)


class TestRandom:
    @pytest.mark.parametrize("tokens", [2, 63, 512, 1025])
    def test_exact_length_with_the_special_tokens(self, tokens):
        for request in requests_of("random", tokens=tokens):
            assert TEXTS.count(request.prompt) == tokens
            assert request.output_tokens == 9

    def test_same_seed_same_requests(self):
        assert requests_of("random") == requests_of("random")

    @pytest.mark.parametrize("other", [{"seed": 1}, {"round_": 1}])
    def test_another_seed_or_round_shares_nothing(self, other):
        first, second = requests_of("random"), requests_of("random", **other)
        assert not {r.prompt[:40] for r in first} & {r.prompt[:40] for r in second}


class TestSharedPrefix:
    def test_requests_share_in_groups(self):
        prompts = [r.prompt for r in requests_of("shared-prefix")]
        groups = len(prompts) // PER_PREFIX
        for first in range(groups):
            shared = common_start(prompts[first::groups])
            assert TEXTS.count(shared) >= SHARED_SHARE * 256
            assert TEXTS.count(shared) < 0.9 * 256
        assert TEXTS.count(common_start(prompts)) < 10

    def test_length(self):
        for request in requests_of("shared-prefix"):
            assert 250 <= TEXTS.count(request.prompt) <= 256


class TestMultiTurn:
    def test_each_turn_goes_on_from_the_one_before(self):
        prompts = [r.prompt for r in requests_of("multi-turn")]
        conversations = len(prompts) // TURNS
        for at in range(conversations):
            turns = prompts[at::conversations]
            for before, after in pairwise(turns):
                assert after.startswith(before)
                assert after.endswith("Assistant:")
            assert 200 <= TEXTS.count(turns[-1]) <= 256

    def test_a_turn_waits_for_the_one_before_it(self):
        with pytest.raises(ValueError, match=r"at least 4 requests for each one in flight.* got 8"):
            Point(
                workload="multi-turn",
                prompt_tokens=64,
                output_tokens=4,
                requests=8,
                concurrency=3,
            )

    def test_too_short(self):
        with pytest.raises(
            ValueError, match=r"multi-turn: expected prompts of at least \d+ tokens"
        ):
            requests_of("multi-turn", tokens=40)

    def test_open_loop_is_refused(self):
        with pytest.raises(ValueError, match="expected a closed loop"):
            Point(workload="multi-turn", prompt_tokens=64, output_tokens=4, requests=4, rate=1.0)


class TestDocuments:
    @pytest.fixture
    def folder(self, tmp_path):
        words = " ".join(f"the lamp of farmer number {i}" for i in range(400))
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / "a.txt").write_text(words)
        (tmp_path / "b.md").write_text("short")
        (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
        return tmp_path

    def test_questions_about_pieces_of_the_texts(self, folder):
        made = [r.prompt for r in requests_of("documents", documents=str(folder))]
        pieces, questions = zip(*(p.split("\n\nQuestion: ") for p in made), strict=True)
        text = (folder / "deep" / "a.txt").read_text()
        assert all(piece.strip() in text for piece in pieces)
        assert len(set(pieces)) == 2
        assert len(set(questions)) == 4
        assert all(TEXTS.count(p) <= 256 for p in made)

    def test_too_little_text(self, folder):
        with pytest.raises(ValueError, match=r"documents: expected at least \d+ tokens of text"):
            requests_of("documents", documents=str(folder), tokens=32_000)

    def test_no_two_pieces_of_a_run_begin_alike(self, tmp_path):
        """Neither over rounds nor over lengths and loads; the gate's is yet another one."""
        # Few places for 17 pieces: draws that may come twice would do so.
        numbers = " ".join(map(str, range(10_000, 10_030)))
        (tmp_path / "a.txt").write_text(numbers)
        points = tuple(
            Point(
                workload="documents",
                prompt_tokens=tokens,
                output_tokens=4,
                requests=8,
                concurrency=load,
            )
            for tokens in (64, 100)
            for load in (1, 2)
        )
        settings = Settings(
            model=NEEDLE, points=points, rounds=2, passkey_share=0, documents=str(tmp_path)
        )
        pieces = {
            beginning(r.prompt)
            for point in points
            for round_ in range(2)
            for r in make_requests(settings, point, round_, TEXTS)
        }
        gate = shared_prompts(settings, "documents", 64, TEXTS, random.Random(0))
        assert len(pieces) == 4 * 2 * 2
        assert len(set(map(beginning, gate))) == 1
        assert beginning(gate[0]) not in pieces

    def test_no_folder_and_no_text(self, tmp_path):
        with pytest.raises(ValueError, match="expected a folder, found none"):
            read_documents(tmp_path / "none")
        with pytest.raises(ValueError, match="found 0 such files and no text"):
            read_documents(tmp_path)

    def test_other_encoding(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"caf\xe9")
        with pytest.raises(ValueError, match=r"a.txt: expected UTF-8 text"):
            read_documents(tmp_path)


class TestPasskeys:
    def test_spread_evenly_and_answerable(self):
        made = requests_of("random", share=0.25, requests=8)
        places = [index for index, request in enumerate(made) if request.answer]
        assert places == [2, 6]
        for index in places:
            told = made[index].prompt.rpartition("The pass key is")[0].rpartition("The pass key is")
            assert first_number(told[2]) == made[index].answer
            assert 230 <= TEXTS.count(made[index].prompt) <= 256
        assert len(made) == 10

    def test_others_keep_their_order(self):
        made = [r.prompt for r in requests_of("multi-turn", share=0.5) if not r.answer]
        # The pass keys are drawn last: the others are those without pass keys.
        assert made == [r.prompt for r in requests_of("multi-turn")]


class TestDataset:
    def write(self, folder, *lines):
        file = folder / "own.jsonl"
        file.write_bytes(b"\n".join(lines))
        return file

    def test_prompts_and_lengths(self, tmp_path):
        file = self.write(tmp_path, b'{"prompt": "a", "output_tokens": 3}', b"", b'{"prompt": "b"}')
        assert [(r.prompt, r.output_tokens) for r in read_dataset(file, 9)] == [("a", 3), ("b", 9)]

    def test_every_broken_line_is_named(self, tmp_path):
        file = self.write(
            tmp_path,
            b'{"prompt": "fine"}',
            b'{"prompt": ',
            b"[1]",
            b'{"text": "a"}',
            b'{"prompt": "a", "output_tokens": 0}',
            b'{"prompt": "\xff"}',
        )
        with pytest.raises(ValueError, match="got 5 broken lines: correct or remove") as caught:
            read_dataset(file, 9)
        for words in (
            "line 2: no JSON",
            "line 3: an object was expected, got list",
            'line 4: "prompt" must be a text',
            'line 5: "output_tokens" must be a whole number above 0, got 0',
            "line 6: no JSON",
        ):
            assert words in str(caught.value)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(ValueError, match="expected a JSONL file, found none"):
            read_dataset(tmp_path / "none.jsonl", 9)
        with pytest.raises(ValueError, match="found an empty file"):
            read_dataset(self.write(tmp_path, b""), 9)

    def test_rounds_take_their_own_lines(self, tmp_path):
        lines = [json.dumps({"prompt": f"p{i}"}).encode() for i in range(5)]
        given = {"dataset": str(self.write(tmp_path, *lines)), "tokens": 0, "requests": 2}
        made = [
            [r.prompt for r in requests_of("dataset", round_=i, rounds=2, **given)]
            for i in range(2)
        ]
        assert made == [["p0", "p1"], ["p2", "p3"]]
        with pytest.raises(ValueError, match=r"expected 6 lines, .* of 3 rounds.* got 5"):
            requests_of("dataset", rounds=3, **given)
