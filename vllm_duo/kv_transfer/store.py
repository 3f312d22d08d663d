"""Files of prefixes: what each is called, how it is checked, how it is written and read.

One file is one retrieval page (``P_r`` tokens of all layers) or one ring (the streaming state of all
layers at the end of a block). Its name is vLLM's hash of the prefix that ends there, in a folder
named by all else that its bytes depend on (``identity.py``). A file that does not carry the right
header, size and checksum is not there: it is a miss and is told of once.
"""

from __future__ import annotations

import itertools
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from vllm_duo.logging import get_logger

logger = get_logger(__name__)

MAGIC = b"duo-kv-1"
HASH_BYTES = 32
_FIELDS = struct.Struct(f"<8s{HASH_BYTES}s4s{HASH_BYTES}sQI")
"""Magic, server, kind, prefix, bytes that follow the header, their CRC-32."""
_CHECK = struct.Struct("<I")
"""CRC-32 of the fields."""
HEADER_BYTES = _FIELDS.size + _CHECK.size
TEMPORARY = ".tmp"
_count = itertools.count()


class Kind(Enum):
    """What a file holds."""

    PAGE = "page"
    """One block of tokens of the retrieval heads."""
    RING = "ring"
    """The streaming heads' state at the end of a prefix."""


@dataclass(frozen=True, slots=True)
class Key:
    """Name of a file.

    Attributes:
        kind: what it holds.
        prefix: vLLM's hash of the prefix that ends there.
    """

    kind: Kind
    prefix: bytes


class Store:
    """The files of one server, and of all that compute the same.

    Args:
        root: the folder of ``kv_connector_extra_config``.
        server: 32 bytes that stand for all that the bytes depend on but the tokens.
    """

    def __init__(self, root: Path, server: bytes) -> None:
        self.root = root
        self.server = server
        self.folder = root / server.hex()
        self.damaged: set[Key] = set()
        self._told = False

    def path(self, key: Key) -> Path:
        """Where a file lies."""
        name = key.prefix.hex()
        return self.folder / name[:2] / f"{name}.{key.kind.value}"

    def has(self, key: Key) -> bool:
        """Whether the file is there and was not found to be damaged."""
        return key not in self.damaged and os.path.exists(self.path(key))

    def touch(self, key: Key, when_ns: int) -> bool:
        """Say that a file was last used at ``when_ns``; False if it is not there."""
        if key in self.damaged:
            return False
        try:
            os.utime(self.path(key), ns=(when_ns, when_ns))
        except FileNotFoundError:
            return False
        except OSError:
            # Another user's file: its use cannot be noted, and is none of a reader's business.
            return True
        return True

    def read(self, key: Key, into: memoryview) -> bool:
        """Read a file's payload.

        Args:
            key: which file.
            into: as many bytes as the payload must have; undefined where False is returned.

        Returns:
            False if there is no such file, or none that can be trusted; that is logged once.
        """
        try:
            with self.path(key).open("rb", buffering=0) as file:
                problem = self._read(key, file, into)
        except FileNotFoundError:
            return False
        except OSError as error:
            problem = str(error)
        if problem is None:
            return True
        self.damaged.add(key)
        if not self._told:
            self._told = True
            logger.warning(
                "duo: %s is not used: %s. What it stood for is computed again and stored anew. "
                "Further files like it are not told of.",
                self.path(key),
                problem,
            )
        return False

    def _read(self, key: Key, file: object, into: memoryview) -> str | None:
        """Why the file is not the one that was asked for; None if it is, and ``into`` is filled."""
        size = os.fstat(file.fileno()).st_size  # type: ignore[attr-defined]
        expected = HEADER_BYTES + into.nbytes
        if size != expected:
            return f"expected {expected} bytes, got {size}"
        head = bytearray(HEADER_BYTES)
        if not _fill(file, memoryview(head)) or not _fill(file, into):
            return "it became shorter while it was read"
        fields = self._fields(key, into.nbytes, zlib.crc32(into))
        if bytes(head) != fields + _CHECK.pack(zlib.crc32(fields)):
            return "its header or checksum is not that of this server's file of that name"
        return None

    def _fields(self, key: Key, num_bytes: int, checksum: int) -> bytes:
        kind = key.kind.value.encode()
        return _FIELDS.pack(MAGIC, self.server, kind, key.prefix, num_bytes, checksum)

    def write(self, key: Key, parts: Sequence[memoryview], when_ns: int) -> None:
        """Write a file, whole or not at all: readers see the one before or this one.

        It is not flushed to the disk: after a loss of power the checksum tells what is left of it.

        Args:
            key: which file.
            parts: of the payload, one after another.
            when_ns: when it was last used, for the eviction of the oldest.

        Raises:
            OSError: the disk is full, or the like.
        """
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{next(_count)}{TEMPORARY}")
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(part, checksum)
        fields = self._fields(key, sum(part.nbytes for part in parts), checksum)
        try:
            with temporary.open("wb") as file:
                file.write(fields + _CHECK.pack(zlib.crc32(fields)))
                for part in parts:
                    file.write(part)
            os.utime(temporary, ns=(when_ns, when_ns))
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def clear(self) -> None:
        """Remove the files of this server, and of all that compute the same."""
        for path in self.folder.glob("*/*"):
            if path.suffix.removeprefix(".") in {kind.value for kind in Kind}:
                path.unlink(missing_ok=True)
        self.damaged.clear()


def _fill(file: object, into: memoryview) -> bool:
    """Read until ``into`` is full; False at the file's end."""
    done = 0
    while done < into.nbytes:
        count = file.readinto(into[done:])  # type: ignore[attr-defined]
        if not count:
            return False
        done += count
    return True
