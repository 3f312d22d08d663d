"""``vllm-duo patterns``: list, show, diff and validate."""

from __future__ import annotations

import json

import pytest

from tests.planning.models import write_model
from vllm_duo.heads import HeadPattern
from vllm_duo.heads.discovery import list_shipped

LLAMA = "Meta-Llama-3.1-8B-Instruct"


@pytest.fixture
def folder(tmp_path):
    """Saves a pattern of these values, returns its folder."""

    def folder(name: str, values, **metadata) -> str:
        HeadPattern(values, metadata).save(tmp_path / name)
        return str(tmp_path / name)

    return folder


class TestList:
    def test_all_that_ship(self, run):
        code, out, _ = run("patterns", "list")
        assert code == 0
        assert all(name in out for name in list_shipped())

    def test_json(self, run):
        found = json.loads(run("patterns", "list", "--json")[1])["patterns"]
        assert [item["pattern"] for item in found] == list_shipped()
        assert HeadPattern.load(found[0]["folder"]).num_layers == found[0]["layers"]


class TestShow:
    def test_marks_the_retrieval_heads(self, run, folder):
        code, out, _ = run("patterns", "show", folder("mine", [[0.1, 0.9], [0.8, 0.2]]))
        assert code == 0
        assert "   0 1 9*\n   1 8*2 \n" in out
        assert "2 of 4 are retrieval heads" in out

    def test_other_cut(self, run, folder):
        mine = folder("mine", [[0.1, 0.9], [0.8, 0.2]])
        assert (
            "1 of 4 are retrieval heads" in run("patterns", "show", mine, "--sparsity", "0.75")[1]
        )
        assert "3 of 4 are" in run("patterns", "show", mine, "--threshold", "0.2")[1]

    def test_shipped_name_in_any_case(self, run):
        assert "f154682e8de4f03c" in run("patterns", "show", LLAMA.lower())[1]

    def test_figure(self, run, tmp_path):
        file = tmp_path / "pattern.png"
        assert run("patterns", "show", LLAMA, "--plot", str(file))[0] == 0
        assert file.read_bytes().startswith(b"\x89PNG")


class TestDiff:
    def test_json(self, run, folder):
        a = folder("a", [[0.1, 0.9], [0.8, 0.2]])
        b = folder("b", [[0.2, 0.9], [0.1, 0.3]])
        code, out, _ = run("patterns", "diff", a, b, "--sparsity", "0.5,0.75", "--json")
        found = json.loads(out)
        assert code == 0
        assert found["rank_correlation"] == pytest.approx(0.4)
        assert [item["sparsity"] for item in found["overlap"]] == [0.5, 0.75]
        assert found["overlap"][0]["both_retrieval"] == 1

    def test_table_and_figure(self, run, tmp_path):
        file = tmp_path / "diff.svg"
        code, out, _ = run("patterns", "diff", LLAMA, LLAMA, "--plot", str(file))
        assert code == 0
        assert "rank correlation 1.000" in out
        assert file.read_bytes().count(b"<image") >= 3  # both patterns and their difference

    def test_equal_values_have_no_correlation(self, run, folder):
        a, b = folder("a", [[1.0, 1.0]]), folder("b", [[0.0, 1.0]])
        assert "not defined" in run("patterns", "diff", a, b)[1]

    def test_other_model(self, run):
        code, _, stderr = run("patterns", "diff", LLAMA, "Llama-2-7B-32K-Instruct")
        assert code == 2
        assert "expected one shape, got 32 x 8 (layers x KV heads) and 32 x 32" in stderr

    @pytest.mark.parametrize("given", ["half", "0.5,", "1.5"])
    def test_bad_cut(self, run, given):
        code, _, stderr = run("patterns", "diff", LLAMA, LLAMA, "--sparsity", given)
        assert code == 2
        assert "from 0 to 1" in stderr


class TestValidate:
    def test_good(self, run, tmp_path):
        model = write_model(tmp_path, 32, 32, 8, 4096)
        code, out, _ = run("patterns", "validate", LLAMA, "--model", model)
        assert code == 0
        assert "valid, 32 layers x 8 KV heads, sink 64 + recent 256 tokens (default)" in out

    def test_other_shape_than_the_model(self, run, tmp_path):
        model = write_model(tmp_path, 28, 32, 8, 4096)
        code, _, stderr = run("patterns", "validate", LLAMA, "--model", model)
        assert code == 2
        assert "head pattern has 32 layers, the model has 28" in stderr

    def test_bad_value(self, run, folder, tmp_path):
        mine = folder("mine", [[0.1, 0.9]])
        (tmp_path / "mine" / "full_attention_heads.tsv").write_text("0.1\tnan\n")
        code, _, stderr = run("patterns", "validate", mine)
        assert code == 2
        assert "line 1, column 2: expected a value in [-0.01, 1.01], got nan" in stderr

    def test_bad_setting(self, run, folder):
        mine = folder("mine", [[0.1, 0.9]], deploy_sink_size="many")
        code, _, stderr = run("patterns", "validate", mine)
        assert code == 2
        assert "deploy_sink_size: expected a whole number of tokens" in stderr

    def test_nothing_there(self, run):
        code, _, stderr = run("patterns", "validate", "no-such-thing")
        assert code == 2
        assert "expected a folder or the name of a shipped pattern" in stderr
