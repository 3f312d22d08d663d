"""Checkpoints: whole or old after a kill, bound to their run."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from vllm_duo.identify.checkpoint import (
    CHECKPOINT_NAME,
    load_checkpoint,
    remove_checkpoint,
    run_fingerprint,
    save_checkpoint,
    write_atomically,
)


def test_state_comes_back(tmp_path):
    arrays = {"gates": np.arange(4.0, dtype=np.float32).reshape(2, 2), "step": np.array(3)}
    save_checkpoint(tmp_path, "run", arrays)
    found = load_checkpoint(tmp_path, "run")
    assert set(found) == set(arrays)
    for name, value in arrays.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path, "run") is None


def test_another_runs_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path, "aaaa", {"x": np.array(1)})
    with pytest.raises(ValueError, match=r"fingerprint bbbb.*aaaa.*another --out"):
        load_checkpoint(tmp_path, "bbbb")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"text"])
def test_damaged_checkpoint_is_named(tmp_path, content):
    (tmp_path / CHECKPOINT_NAME).write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.npz.*cannot be read"):
        load_checkpoint(tmp_path, "run")


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_kill_while_writing_leaves_the_old_file(tmp_path, monkeypatch, moment):
    file = tmp_path / "file"
    write_atomically(file, b"old")

    def kill(*arguments):
        raise SystemExit

    monkeypatch.setattr(os, moment, kill)
    with pytest.raises(SystemExit):
        write_atomically(file, b"new content")
    assert file.read_bytes() == b"old"


def test_full_disk_keeps_the_old_checkpoint_and_says_what_to_do(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, "run", {"x": np.array(1)})

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    told = (
        r"disk of .* is full, .*: \d+ bytes are needed in .*, \d+ are free; .* is kept: .*--resume"
    )
    with pytest.raises(OSError, match=told):
        save_checkpoint(tmp_path, "run", {"x": np.array(2)})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path, "run")["x"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_NAME]


def test_removing_needs_no_checkpoint(tmp_path):
    remove_checkpoint(tmp_path)
    save_checkpoint(tmp_path, "run", {})
    remove_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())


def test_fingerprint_tells_settings_apart_whatever_their_order():
    assert run_fingerprint({"a": 1, "b": 2}) == run_fingerprint({"b": 2, "a": 1})
    assert run_fingerprint({"a": 1}) != run_fingerprint({"a": 2})
