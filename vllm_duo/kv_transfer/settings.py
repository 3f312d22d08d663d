"""What ``kv_connector_extra_config`` says to the connector."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEYS = ("path", "max_bytes")


@dataclass(frozen=True)
class StorageSettings:
    """Settings of the storage.

    Attributes:
        path: folder that the files lie in; servers that share it share prefixes.
        max_bytes: bytes of all files in it together, at most.
    """

    path: Path
    max_bytes: int

    @classmethod
    def read(cls, extra_config: Mapping[str, Any]) -> StorageSettings:
        """Read the settings of a server.

        Args:
            extra_config: vLLM's ``kv_connector_extra_config``.

        Raises:
            ValueError: with every key that is unknown, missing or impossible.
        """
        problems = [
            f"{key}: unknown key, expected {' and '.join(KEYS)}"
            for key in extra_config
            if key not in KEYS
        ]
        path, max_bytes = extra_config.get("path"), extra_config.get("max_bytes")
        if not isinstance(path, str) or not os.path.isabs(os.path.expanduser(path)):
            problems.append(f"path: expected the absolute path of a folder, got {path!r}")
        if not isinstance(max_bytes, int) or isinstance(max_bytes, bool) or max_bytes < 1:
            problems.append(f"max_bytes: expected a whole number of bytes, got {max_bytes!r}")
        if problems:
            raise ValueError("; ".join(problems))
        assert isinstance(path, str)
        assert isinstance(max_bytes, int)
        return cls(Path(path).expanduser(), max_bytes)


def folder_problem(path: Path) -> str | None:
    """Why no files can be kept in a folder, which is made if it is missing; None if they can."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"path: {path} cannot be made: {error}"
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return f"path: {path} cannot be written: give this user the rights to"
    return None
