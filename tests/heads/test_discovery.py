"""find_pattern: which folder a model gets, and what it is told when there is none."""

from pathlib import Path

import pytest

from vllm_duo.heads import HeadPattern, find_pattern
from vllm_duo.heads.discovery import ALIASES, PUBLISHED, list_shipped

SHIPPED_SHAPES = {
    "Llama-2-7B-32K-Instruct": (32, 32),
    "Llama-3-8B-Instruct-Gradient-1048k": (32, 8),
    "Meta-Llama-3.1-8B-Instruct": (32, 8),
    "Mistral-7B-Instruct-v0.2": (32, 8),
}
LLAMA = "Meta-Llama-3.1-8B-Instruct"


@pytest.fixture(autouse=True)
def _empty_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_pattern(folder: Path, num_layers: int = 2, num_kv_heads: int = 2) -> Path:
    HeadPattern.uniform(num_layers, num_kv_heads).save(folder)
    return folder


def error_of(*args) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller checks the whole text
        find_pattern(*args)
    return str(caught.value)


class TestShipped:
    def test_all_four_are_listed_in_order(self):
        assert list_shipped() == sorted(SHIPPED_SHAPES)

    @pytest.mark.parametrize("name", SHIPPED_SHAPES)
    def test_each_is_found_by_name_and_loads(self, name):
        found = find_pattern(name, "org/any", *SHIPPED_SHAPES[name])
        assert found.path == PUBLISHED / name

    @pytest.mark.parametrize("name", SHIPPED_SHAPES)
    def test_each_names_its_origin_and_setting(self, name):
        assert (PUBLISHED / name / "ORIGIN_SETTING.txt").read_text().startswith("lr=0.02")
        assert (PUBLISHED / "LICENSE.duo-attention.MIT").is_file()

    def test_aliases_are_lower_case_and_lead_to_shipped_patterns(self):
        assert all(alias == alias.lower() for alias in ALIASES)
        assert set(ALIASES.values()) <= set(list_shipped())


class TestNamedPattern:
    def test_folder_is_loaded(self, tmp_path):
        folder = make_pattern(tmp_path / "mine")
        assert find_pattern(str(folder), "org/any", 2, 2).path == folder

    def test_home_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        folder = make_pattern(tmp_path / "mine")
        assert find_pattern("~/mine", "org/any", 2, 2).path == folder

    def test_it_wins_over_the_folder_beside_the_model(self, tmp_path):
        make_pattern(tmp_path / "model" / "duo_pattern")
        folder = make_pattern(tmp_path / "mine")
        assert find_pattern(str(folder), str(tmp_path / "model"), 2, 2).path == folder

    @pytest.mark.parametrize("name", [LLAMA.upper(), "Llama-3.1-8B-Instruct"])
    def test_shipped_name_ignores_case_and_takes_aliases(self, name):
        assert find_pattern(name, "org/any", 32, 8).path == PUBLISHED / LLAMA

    def test_existing_folder_wins_over_a_shipped_pattern_of_the_same_name(self, tmp_path):
        make_pattern(tmp_path / LLAMA)
        assert find_pattern(LLAMA, "org/any", 2, 2).path == Path(LLAMA)

    def test_folder_without_a_pattern_that_hides_a_shipped_one_is_explained(self, tmp_path):
        (tmp_path / LLAMA).mkdir()
        assert error_of(LLAMA, "org/any", 32, 8) == (
            f"pattern {LLAMA!r}: expected a folder with full_attention_heads.tsv, found "
            f"{tmp_path / LLAMA} without it: rename that, or for the shipped pattern of this name "
            f"set pattern={str(PUBLISHED / LLAMA)!r}"
        )

    def test_unknown_name_lists_the_shipped_ones(self):
        assert error_of("nonsense", "org/any", 32, 8) == (
            "pattern 'nonsense': expected a folder or the name of a shipped pattern "
            f"({', '.join(sorted(SHIPPED_SHAPES))}), found neither: correct the name or give an "
            "existing folder (pattern=...)"
        )

    def test_near_miss_is_suggested(self):
        message = error_of("mistral-7b-instruct-v0.3", "org/any", 32, 8)
        assert "(did you mean 'Mistral-7B-Instruct-v0.2'?)" in message

    @pytest.mark.parametrize("blank", ["", "  "])
    def test_blank_is_not_the_working_directory(self, blank, tmp_path):
        make_pattern(tmp_path)
        assert "found neither" in error_of(blank, "org/any", 2, 2)

    def test_wrong_shape_is_refused(self):
        message = error_of(LLAMA, "org/any", 28, 8)
        assert message.startswith("head pattern has 32 layers, the model has 28: use a pattern")


class TestDefault:
    def test_folder_beside_the_model_is_loaded(self, tmp_path):
        folder = make_pattern(tmp_path / "model" / "duo_pattern")
        assert find_pattern(None, str(tmp_path / "model"), 2, 2).path == folder

    def test_folder_beside_the_model_wins_over_a_shipped_pattern(self, tmp_path):
        folder = make_pattern(tmp_path / LLAMA / "duo_pattern")
        assert find_pattern(None, str(tmp_path / LLAMA), 2, 2).path == folder

    def test_broken_folder_beside_the_model_is_an_error_not_skipped(self, tmp_path):
        (tmp_path / LLAMA / "duo_pattern").mkdir(parents=True)
        assert "found no such file" in error_of(None, str(tmp_path / LLAMA), 32, 8)

    @pytest.mark.parametrize(
        ("model", "name"),
        [
            ("meta-llama/Meta-Llama-3.1-8B-Instruct", LLAMA),
            ("meta-llama/Llama-3.1-8B-Instruct", LLAMA),
            ("META-LLAMA/llama-3.1-8b-INSTRUCT", LLAMA),
            ("mistralai/Mistral-7B-Instruct-v0.2", "Mistral-7B-Instruct-v0.2"),
            ("/models/Mistral-7B-Instruct-v0.2/", "Mistral-7B-Instruct-v0.2"),
            ("togethercomputer/Llama-2-7B-32K-Instruct", "Llama-2-7B-32K-Instruct"),
            (
                "gradientai/Llama-3-8B-Instruct-Gradient-1048k",
                "Llama-3-8B-Instruct-Gradient-1048k",
            ),
        ],
    )
    def test_shipped_pattern_matches_the_last_component(self, model, name):
        assert find_pattern(None, model, *SHIPPED_SHAPES[name]).path == PUBLISHED / name

    @pytest.mark.parametrize("tail", ["", "/"])
    @pytest.mark.parametrize("present", [True, False])
    def test_snapshot_in_the_hugging_face_cache_counts_by_repository(self, tail, present, tmp_path):
        snapshot = tmp_path / "hub/models--meta-llama--Llama-3.1-8B-Instruct/snapshots/0e9e39f2"
        if present:
            snapshot.mkdir(parents=True)
        assert find_pattern(None, f"{snapshot}{tail}", 32, 8).path == PUBLISHED / LLAMA

    def test_working_directory_counts_by_its_name(self, tmp_path, monkeypatch):
        (tmp_path / LLAMA).mkdir()
        monkeypatch.chdir(tmp_path / LLAMA)
        assert find_pattern(None, ".", 32, 8).path == PUBLISHED / LLAMA

    @pytest.mark.parametrize(
        "model",
        [
            "meta-llama/Llama-3.1-8B",
            "meta-llama/Meta-Llama-3-8B-Instruct",
            "RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8",
            "mistralai/Mistral-7B-Instruct-v0.3",
            "gradientai/Llama-3-8B-Instruct-262k",
            "Meta-Llama-3.1-8B-Instruct/checkpoint-100",
        ],
    )
    def test_relatives_of_the_same_shape_get_nothing(self, model):
        assert error_of(None, model, 32, 8).startswith(f"no head pattern for model {model!r}")

    def test_no_pattern_says_how_to_make_one(self):
        assert error_of(None, "org/my model", 32, 8) == (
            "no head pattern for model 'org/my model': expected the folder "
            "org/my model/duo_pattern or a shipped pattern of the model's name "
            f"({', '.join(sorted(SHIPPED_SHAPES))}), found neither, and nothing falls back to a "
            "full cache silently: make one with `vllm-duo identify MODEL --out DIR` and set "
            "pattern=DIR, or, if the model is a copy of one of those named, set "
            "pattern=NAME"
        )

    def test_right_name_and_wrong_shape_is_refused(self):
        message = error_of(None, "tiny/Meta-Llama-3.1-8B-Instruct", 2, 1)
        assert "head pattern has 32 layers, the model has 2; head pattern has 8 KV" in message
        assert "model: tiny/Meta-Llama-3.1-8B-Instruct" in message
