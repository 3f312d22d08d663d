"""Which files' changes ask a suite again."""

from __future__ import annotations

import os

import pytest

from tests.evaluate.own_suite import write_suite
from vllm_duo.evaluate.suite_files import hash_suite


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """A folder with a task of each kind; what lies elsewhere is in ``elsewhere`` and ``work``."""
    monkeypatch.chdir(tmp_path)
    suite, elsewhere, work = (tmp_path / name for name in ("suite", "elsewhere", "work"))
    for folder in (suite / "deep", elsewhere / "more", work):
        folder.mkdir(parents=True)
    monkeypatch.chdir(work)
    for name in ("base.yaml", "base.jsonl", "one.jsonl", "more/a.csv", "more/b.csv", "kept.txt"):
        (elsewhere / name).write_text("")
    (elsewhere / "base.yaml").write_text(
        f"dataset_kwargs: {{data_files: [{elsewhere}/base.jsonl, hf://datasets/a/b.jsonl]}}\n"
    )
    (work / "here.jsonl").write_text("")
    (suite / "documents.jsonl").write_text("[1]\n")
    (suite / "utils.py").write_text("")
    (suite / "deep" / "own.yaml").write_text(
        f"""\
include: ../../elsewhere/base.yaml
process: !function utils.process
dataset_path: json
dataset_kwargs: {{data_files: {{test: [{elsewhere}/one.jsonl, here.jsonl]}}}}
"""
    )
    (suite / "glob.yml").write_text(
        f"dataset_path: csv\ndataset_kwargs: {{data_dir: {elsewhere}/more, data_files: '*.csv'}}\n"
    )
    return suite


@pytest.mark.parametrize(
    "changed",
    [
        "suite/documents.jsonl",
        "suite/utils.py",
        "suite/deep/own.yaml",
        "suite/new.parquet",
        "elsewhere/base.yaml",
        "elsewhere/base.jsonl",
        "elsewhere/one.jsonl",
        "elsewhere/more/b.csv",
        "work/here.jsonl",
    ],
)
def test_a_change_is_seen(suite, changed):
    before = hash_suite(suite)
    assert hash_suite(suite) == before
    with (suite.parent / changed).open("a") as file:
        file.write("\n")
    assert hash_suite(suite) != before


def test_a_file_that_is_gone_or_renamed_is_seen(suite):
    found = [hash_suite(suite)]
    (suite / "documents.jsonl").rename(suite / "others.jsonl")
    found.append(hash_suite(suite))
    (suite / "others.jsonl").unlink()
    found.append(hash_suite(suite))
    assert len(set(found)) == 3


def test_what_lm_eval_writes_and_files_that_no_task_names_change_nothing(suite):
    before = hash_suite(suite)
    (suite / "__pycache__").mkdir()
    (suite / "__pycache__" / "utils.cpython-311.pyc").write_bytes(b"\0")
    (suite.parent / "elsewhere" / "kept.txt").write_text("other")
    os.mkfifo(suite / "pipe")  # no regular file: reading it would wait for ever
    assert hash_suite(suite) == before


def test_links_are_followed_and_a_circle_ends(suite):
    documents = suite.parent / "linked"
    documents.mkdir()
    (documents / "a.jsonl").write_text("")
    (suite / "link").symlink_to(documents)
    (suite / "circle").symlink_to(suite)
    before = hash_suite(suite)
    (documents / "a.jsonl").write_text("[1]\n")
    assert hash_suite(suite) != before


def test_a_folder_of_documents_as_dataset_path(suite):
    documents = suite.parent / "folder"
    documents.mkdir()
    (suite / "glob.yml").write_text("dataset_path: ../folder\n")
    before = hash_suite(suite)
    (documents / "test.jsonl").write_text("")
    assert hash_suite(suite) != before


def test_the_suite_of_the_other_tests(tmp_path):
    suite = write_suite(tmp_path, [{"prompt": "a", "answer": "1"}])
    before = hash_suite(suite)
    (tmp_path / "documents.jsonl").write_text('{"prompt": "a", "answer": "2"}\n')
    assert hash_suite(suite) != before


def test_no_yaml(suite):
    (suite / "broken.yaml").write_text("task: [\n")
    with pytest.raises(ValueError, match=r"broken.yaml: expected YAML, as lm-eval reads its tasks"):
        hash_suite(suite)
