"""The writing thread and the bound on bytes: the oldest go first, a full disk stops nothing."""

from __future__ import annotations

import os
import time

import pytest

from tests.messages import messages_of
from vllm_duo.kv_transfer import writer as writer_module
from vllm_duo.kv_transfer.budget import OLD_SECONDS, Budget
from vllm_duo.kv_transfer.store import HEADER_BYTES, Key, Kind, Store
from vllm_duo.kv_transfer.writer import Writer

PAYLOAD = 1000
FILE = PAYLOAD + HEADER_BYTES


def key(number, kind=Kind.PAGE):
    return Key(kind, number.to_bytes(32, "big"))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path, b"s" * 32)


@pytest.fixture
def writer_of(store):
    made = []

    def make(max_bytes):
        made.append(Writer(store, Budget(store.root, max_bytes)))
        return made[-1]

    yield make
    for writer in made:
        writer.close()


@pytest.fixture
def told(monkeypatch):
    return messages_of(writer_module, monkeypatch)


def submit(writer, number, when_ns=None):
    data = memoryview(bytes([number % 256]) * PAYLOAD)
    writer.submit(key(number), [data], number if when_ns is None else when_ns)


def there(store, numbers):
    return [number for number in numbers if store.has(key(number))]


def test_all_that_was_submitted_is_there_after_close(store, writer_of):
    writer = writer_of(1 << 20)
    for number in range(100):
        submit(writer, number)
    writer.close()
    assert there(store, range(100)) == list(range(100))


def test_the_least_recently_used_go_and_the_bound_holds(store, writer_of):
    writer = writer_of(10 * FILE)
    for number in range(1, 41):
        submit(writer, number)
        if number == 5:
            writer.flush()
            store.touch(key(1), 10**18)
        writer.flush()
        sizes = [path.stat().st_size for path in store.folder.glob("*/*")]
        assert sum(sizes) <= 10 * FILE
    left = there(store, range(1, 41))
    assert left[0] == 1, "used again"
    assert left[1:] == list(range(40 - len(left) + 2, 41)), "the newest"
    assert len(left) >= 8


def test_what_others_wrote_is_counted(store, writer_of):
    for number in range(10):
        store.write(key(number), [memoryview(bytes(PAYLOAD))], number)
    writer = writer_of(10 * FILE)
    submit(writer, 100, 10**18)
    writer.flush()
    assert 0 not in there(store, range(10))
    assert store.has(key(100))


def test_nothing_but_stored_files_is_removed(store, writer_of, tmp_path):
    notes = tmp_path / "notes.page"
    notes.write_bytes(bytes(50 * FILE))
    store.write(key(0), [memoryview(bytes(PAYLOAD))], 0)
    beside = store.path(key(0)).with_name("thesis.page")
    beside.write_bytes(bytes(50 * FILE))
    old, new = (
        store.path(key(0)).with_name(f"{key(0).prefix.hex()}.page.{pid}.0.tmp") for pid in (1, 2)
    )
    for path in (old, new):
        path.write_bytes(b"x")
    then = time.time() - OLD_SECONDS - 10
    os.utime(old, (then, then))
    writer = writer_of(2 * FILE)
    for number in range(1, 10):
        submit(writer, number)
    writer.flush()
    assert notes.exists()
    assert beside.exists()
    assert not store.has(key(0))
    assert not old.exists()


def test_a_full_disk_is_one_warning_and_is_tried_again(store, writer_of, told, monkeypatch):
    writer, write = writer_of(1 << 20), store.write

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write", full)
    for number in range(5):
        submit(writer, number)
    writer.flush()
    ((level, text),) = told
    assert level == "WARNING"
    assert "No space left on device" in text
    assert not writer.wants(key(9), PAYLOAD)
    monkeypatch.setattr(store, "write", write)
    writer._paused_until = 0.0
    assert writer.wants(key(9), PAYLOAD)
    submit(writer, 9)
    writer.flush()
    assert there(store, range(10)) == [9]
    assert len(told) == 1


def test_a_file_above_the_bound_is_one_warning(store, writer_of, told):
    writer = writer_of(FILE - 1)
    submit(writer, 1)
    writer.flush()
    ((level, text),) = told
    assert level == "WARNING"
    assert "does not fit max_bytes" in text


def test_a_slow_disk_holds_back_no_more_than_its_share(store, writer_of, monkeypatch):
    monkeypatch.setattr(writer_module, "MAX_WAITING_BYTES", 3 * PAYLOAD)
    writer = writer_of(1 << 20)
    with writer._changed:  # the thread cannot take any
        for number in range(3):
            assert writer.wants(key(number), PAYLOAD)
            submit(writer, number)
        assert not writer.wants(key(2), 0), "waits already"
        assert not writer.wants(key(3), PAYLOAD)
    writer.flush()
    assert writer.wants(key(3), 10 * PAYLOAD), "alone it may be of any size"
