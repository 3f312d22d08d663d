"""Digests of weights: found once, and anew whenever a file changed in any way that shows."""

from __future__ import annotations

import hashlib
import os

import pytest

from vllm_duo.kv_transfer import identity
from vllm_duo.kv_transfer.identity import file_digests


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "a.safetensors", "b.safetensors", "README.md", "tokenizer.model"):
        (folder / name).write_bytes(name.encode() * 100)
    return folder


def test_every_file_that_is_computed_with_counts(model, tmp_path):
    digests = file_digests(model, tmp_path / "kv")
    assert digests == {
        name: hashlib.sha256(name.encode() * 100).hexdigest()
        for name in ("a.safetensors", "b.safetensors", "config.json")
    }


def test_unchanged_files_are_read_once(model, tmp_path, monkeypatch):
    first = file_digests(model, tmp_path / "kv")
    monkeypatch.setattr(identity.hashlib, "sha256", counting := Counting(hashlib.sha256))
    assert file_digests(model, tmp_path / "kv") == first
    assert counting.updated == 0


def test_a_change_shows_though_size_and_time_are_kept(model, tmp_path):
    path = model / "a.safetensors"
    first, status = file_digests(model, tmp_path / "kv"), path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = file_digests(model, tmp_path / "kv")
    assert second["a.safetensors"] != first["a.safetensors"]


def test_a_model_in_one_file(model, tmp_path):
    path = model / "a.safetensors"
    assert list(file_digests(path, tmp_path / "kv")) == ["a.safetensors"]


class Counting:
    """SHA-256 that counts the objects that content was fed to."""

    def __init__(self, make):
        self.make, self.updated = make, 0

    def __call__(self, *args):
        if not args:
            self.updated += 1
        return self.make(*args)
