"""HeadPattern: made in memory, held against a model, saved to and loaded from a folder."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from vllm_duo.heads import HeadPattern
from vllm_duo.heads.discovery import PUBLISHED, list_shipped

TSV = "full_attention_heads.tsv"


def write_tsv(folder: Path, text: str) -> Path:
    (folder / TSV).write_bytes(text.encode())
    return folder


def error_of(call, *args) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller checks the whole text
        call(*args)
    return str(caught.value)


def load_error(folder: Path) -> str:
    return error_of(HeadPattern.load, folder)


class TestMadeInMemory:
    @pytest.mark.parametrize("bad", [-0.0101, 1.0101, float("nan"), float("-inf")])
    def test_bad_value_is_refused_by_layer_and_head(self, bad):
        values = np.full((3, 2), 0.5)
        values[2, 1] = bad
        assert error_of(HeadPattern, values) == (
            "head pattern, layer 2, KV head 1: expected a value in [-0.01, 1.01], "
            f"got {bad!r}: clip or recompute it"
        )

    @pytest.mark.parametrize("shape", [(3,), (0, 2), (2, 0), (1, 1, 1)])
    def test_anything_but_a_table_is_refused(self, shape):
        assert error_of(HeadPattern, np.zeros(shape)) == (
            "head pattern: expected an array [layers, KV heads] with at least one head, "
            f"got shape {list(shape)}: pass one value per KV head"
        )

    def test_values_are_a_read_only_float64_copy(self):
        values = np.zeros((2, 2), dtype=np.float32)
        pattern = HeadPattern(values)
        values[0, 0] = 1.0
        assert pattern.values.dtype == np.float64
        assert not pattern.values.any()
        assert not pattern.values.flags.writeable

    def test_metadata_is_a_copy(self):
        metadata = {"method": {"name": "gates"}}
        pattern = HeadPattern(np.ones((1, 1)), metadata)
        metadata["method"]["name"] = "other"
        assert pattern.metadata == {"method": {"name": "gates"}}

    def test_uniform_has_the_shape_and_value(self):
        assert HeadPattern.uniform(2, 3, 0.25).values.tolist() == [[0.25] * 3] * 2

    def test_pickled_pattern_keeps_everything(self):
        pattern = HeadPattern(np.ones((1, 2)), {"method": "gates"}, Path("somewhere"))
        clone = pickle.loads(pickle.dumps(pattern))
        assert clone.values.tolist() == [[1.0, 1.0]]
        assert not clone.values.flags.writeable
        assert (clone.metadata, clone.path) == (pattern.metadata, pattern.path)


class TestValidateFor:
    def test_equal_shape_passes(self):
        assert HeadPattern.uniform(32, 8).validate_for(32, 8, "model") is None

    def test_wrong_layers_are_named(self):
        assert error_of(HeadPattern.uniform(28, 8).validate_for, 32, 8, "org/model") == (
            "head pattern has 28 layers, the model has 32: use a pattern made for this checkpoint "
            "(pattern=...) [pattern: made in memory, model: org/model]"
        )

    def test_wrong_heads_are_named(self):
        assert error_of(HeadPattern.uniform(32, 4).validate_for, 32, 8, "model").startswith(
            "head pattern has 4 KV heads per layer, the model has 8: use a pattern made for"
        )

    def test_both_are_named_together_with_the_folder(self):
        pattern = HeadPattern.load(PUBLISHED / "Mistral-7B-Instruct-v0.2")
        message = error_of(pattern.validate_for, 2, 1, "model")
        assert "32 layers, the model has 2; head pattern has 8 KV heads" in message
        assert f"[pattern: {PUBLISHED / 'Mistral-7B-Instruct-v0.2'}, model: model]" in message


class TestSave:
    @pytest.mark.parametrize("name", list_shipped())
    def test_published_values_come_back_byte_for_byte(self, name, tmp_path):
        HeadPattern.load(PUBLISHED / name).save(tmp_path / "new" / name)
        saved = (tmp_path / "new" / name / TSV).read_bytes()
        assert saved == (PUBLISHED / name / TSV).read_bytes()

    @pytest.mark.parametrize("name", list_shipped())
    def test_published_config_comes_back_with_every_key(self, name, tmp_path):
        HeadPattern.load(PUBLISHED / name).save(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved == json.loads((PUBLISHED / name / "config.json").read_text())

    def test_values_are_saved_raw(self, tmp_path):
        values = np.array([[-0.005, 1.007, 0.1]])
        HeadPattern(values).save(tmp_path)
        assert np.array_equal(HeadPattern.load(tmp_path).values, values)

    def test_config_is_written_without_metadata_too(self, tmp_path):
        HeadPattern.uniform(1, 1).save(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()) == {}

    def test_text_beyond_ascii_survives(self, tmp_path):
        HeadPattern(np.ones((1, 1)), {"note": "Köpfe 头"}).save(tmp_path)
        assert HeadPattern.load(tmp_path).metadata == {"note": "Köpfe 头"}

    def test_metadata_that_json_cannot_hold_writes_nothing(self, tmp_path):
        with pytest.raises(TypeError):
            HeadPattern(np.ones((1, 1)), {"bad": object()}).save(tmp_path / "new")
        assert not (tmp_path / "new").exists()


class TestLoad:
    def test_path_is_the_folder(self, tmp_path):
        assert HeadPattern.load(write_tsv(tmp_path, "0.5\t1\n")).path == tmp_path

    def test_config_may_be_missing(self, tmp_path):
        assert HeadPattern.load(write_tsv(tmp_path, "0.5\n")).metadata == {}

    @pytest.mark.parametrize("text", ["0.5\t1", "0.5\t1\r\n", "0.5\t1\n\n\n", "\ufeff0.5\t1\n"])
    def test_line_ends_blank_tail_and_byte_order_mark_do_not_matter(self, text, tmp_path):
        assert HeadPattern.load(write_tsv(tmp_path, text)).values.tolist() == [[0.5, 1.0]]

    def test_values_at_the_limits_are_taken(self, tmp_path):
        pattern = HeadPattern.load(write_tsv(tmp_path, "-0.01\t1.01\n"))
        assert pattern.values.tolist() == [[-0.01, 1.01]]

    def test_missing_folder_is_named(self, tmp_path):
        assert load_error(tmp_path / "gone") == (
            f"head pattern {tmp_path / 'gone'}: expected a folder with {TSV}, found nothing there: "
            "pass an existing pattern folder (pattern=...)"
        )

    def test_file_in_place_of_folder_is_named(self, tmp_path):
        message = load_error(write_tsv(tmp_path, "1\n") / TSV)
        assert f"expected a folder with {TSV}, found a file" in message

    def test_missing_table_is_named(self, tmp_path):
        assert load_error(tmp_path) == (
            f"{tmp_path / TSV}: expected a table of layers x KV heads, found no such file: "
            "pass a pattern folder that holds it (pattern=...)"
        )

    @pytest.mark.parametrize("text", ["", "\n\n", " \n"])
    def test_empty_table_is_refused(self, text, tmp_path):
        assert load_error(write_tsv(tmp_path, text)) == (
            f"{tmp_path / TSV}: expected one line per layer, found an empty file: "
            "make the pattern again"
        )

    @pytest.mark.parametrize(("row", "found"), [("1", 1), ("1\t1\t1", 3)])
    def test_ragged_line_is_named(self, row, found, tmp_path):
        assert load_error(write_tsv(tmp_path, f"0\t0\n0\t1\n{row}\n")) == (
            f"{tmp_path / TSV}, line 3: expected 2 values as in line 1, found {found}: "
            "give every layer one value per KV head, separated by tabs"
        )

    @pytest.mark.parametrize("cell", ["abc", "", "0.1 0.2", "0_5", "0,5", "# 1"])
    def test_cell_that_is_no_number_is_named(self, cell, tmp_path):
        assert load_error(write_tsv(tmp_path, f"0\t0\n0\t{cell}\n0\t0\n")) == (
            f"{tmp_path / TSV}, line 2, column 2: expected a number, got {cell!r}: "
            "correct it or make the pattern again"
        )

    def test_blank_line_inside_the_table_is_named(self, tmp_path):
        message = load_error(write_tsv(tmp_path, "0\t0\n\n0\t0\n"))
        assert f"{TSV}, line 2, column 1: expected a number, got ''" in message

    def test_bytes_that_are_no_text_are_named(self, tmp_path):
        (tmp_path / TSV).write_bytes(b"0\t\xff\xfe\n")
        assert "line 1, column 2: expected a number" in load_error(tmp_path)

    @pytest.mark.parametrize("cell", ["-0.0100001", "1.0100001", "nan", "inf", "-inf", "2.0"])
    def test_value_out_of_range_is_named(self, cell, tmp_path):
        assert load_error(write_tsv(tmp_path, f"0\t0\n{cell}\t0\n")) == (
            f"{tmp_path / TSV}, line 2, column 1: expected a value in [-0.01, 1.01], got {cell}: "
            "correct it or make the pattern again"
        )

    @pytest.mark.parametrize("text", ["{", "", "\x80"])
    def test_config_that_does_not_parse_is_named(self, text, tmp_path):
        (write_tsv(tmp_path, "1\n") / "config.json").write_bytes(text.encode("latin-1"))
        message = load_error(tmp_path)
        start = f"{tmp_path / 'config.json'}: expected a JSON object, got text that does not parse"
        assert re.fullmatch(re.escape(start) + r" \(.+\): correct or remove it", message)

    @pytest.mark.parametrize(("text", "found"), [("[1]", "list"), ("null", "NoneType")])
    def test_config_that_is_no_object_is_named(self, text, found, tmp_path):
        (write_tsv(tmp_path, "1\n") / "config.json").write_text(text)
        assert load_error(tmp_path) == (
            f"{tmp_path / 'config.json'}: expected a JSON object, got {found}: correct or remove it"
        )
