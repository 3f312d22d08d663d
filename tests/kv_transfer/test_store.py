"""Files: written whole or not at all, trusted only if they are what was asked for."""

from __future__ import annotations

import os
import threading

import pytest

from tests.messages import messages_of
from vllm_duo.kv_transfer import store as store_module
from vllm_duo.kv_transfer.store import HEADER_BYTES, Key, Kind, Store

KEY = Key(Kind.PAGE, bytes(range(32)))
DATA = bytes(range(256)) * 3
SIZE = len(DATA)


@pytest.fixture
def told(monkeypatch):
    return messages_of(store_module, monkeypatch)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, b"s" * 32)


def write(store, key=KEY, data=DATA, when_ns=10**18):
    store.write(key, [memoryview(data[:100]), memoryview(data[100:])], when_ns)


def read(store, key=KEY, num_bytes=SIZE):
    into = bytearray(num_bytes)
    return bytes(into) if store.read(key, memoryview(into)) else None


def test_what_was_written_is_read(store, told):
    assert read(store) is None
    assert not store.has(KEY)
    write(store)
    assert store.has(KEY)
    assert read(store) == DATA
    assert store.path(KEY).stat().st_mtime_ns == 10**18
    assert [path.name for path in store.path(KEY).parent.iterdir()] == [f"{KEY.prefix.hex()}.page"]
    assert told == []


@pytest.mark.parametrize("at", [0, 8, 40, 44, 76, 84, 88, HEADER_BYTES, HEADER_BYTES + 300, -1])
def test_any_byte_that_changed_is_found(at, store, told):
    write(store)
    data = bytearray(store.path(KEY).read_bytes())
    data[at] ^= 0x80
    store.path(KEY).write_bytes(data)
    assert read(store) is None
    assert not store.has(KEY)
    ((level, text),) = told
    assert level == "WARNING"
    assert str(store.path(KEY)) in text


@pytest.mark.parametrize("num_bytes", [0, 1, HEADER_BYTES, len(DATA) - 1, len(DATA) + 1])
def test_another_size_is_found(num_bytes, store, told):
    write(store)
    assert read(store, num_bytes=num_bytes) is None
    ((level, text),) = told
    assert level == "WARNING"
    assert "bytes, got" in text


def test_files_of_other_names_kinds_and_servers_are_found(store, tmp_path, told):
    write(store)
    data = store.path(KEY).read_bytes()
    other = Store(tmp_path, b"t" * 32)
    for target, key in (
        (store, Key(Kind.RING, KEY.prefix)),
        (store, Key(Kind.PAGE, b"x" * 32)),
        (other, KEY),
    ):
        target.path(key).parent.mkdir(parents=True, exist_ok=True)
        target.path(key).write_bytes(data)
        assert read(target, key) is None
    assert len(told) == 2, "once a store"
    assert read(store) == DATA


def test_a_folder_in_the_files_place_is_a_miss(store, told):
    store.path(KEY).mkdir(parents=True)
    assert read(store) is None
    assert len(told) == 1


def test_a_failed_write_leaves_nothing(store, monkeypatch):
    write(store)
    monkeypatch.setattr(os, "utime", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28)))
    with pytest.raises(OSError, match="28"):
        write(store, data=DATA[::-1])
    assert read(store) == DATA
    assert len(list(store.path(KEY).parent.iterdir())) == 1


def test_readers_see_one_file_or_the_other_while_several_write(store, told):
    """Four writers of two contents: a reader never meets a mixture of them."""
    contents = [bytes([value]) * (1 << 16) for value in (1, 2)]
    write(store, data=contents[0])
    done = threading.Event()

    def rewrite(data):
        while not done.is_set():
            write(store, data=data)

    writers = [threading.Thread(target=rewrite, args=(contents[n % 2],)) for n in range(4)]
    for writer in writers:
        writer.start()
    seen = {read(store, num_bytes=1 << 16) for _ in range(300)}
    done.set()
    for writer in writers:
        writer.join()
    assert seen <= set(contents)
    assert told == []


def test_touched_files_are_used_now(store):
    assert not store.touch(KEY, 5)
    write(store)
    assert store.touch(KEY, 5 * 10**9)
    assert store.path(KEY).stat().st_mtime == 5


def test_clear_removes_this_servers_files_alone(store, tmp_path):
    other = Store(tmp_path, b"t" * 32)
    write(store)
    write(other)
    (store.folder / "about.json").write_text("{}")
    store.clear()
    assert not store.has(KEY)
    assert other.has(KEY)
    assert (store.folder / "about.json").exists()
