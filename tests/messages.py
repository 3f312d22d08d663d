"""What a module of the plugin logs."""

from __future__ import annotations

import logging
from types import ModuleType

import pytest


def messages_of(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(level, text) of what the module logs from now on.

    Its logger is replaced: those below vLLM's do not propagate, and the first config that vLLM makes in
    a process takes their handlers away.
    """
    records: list[tuple[str, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append((record.levelname, record.getMessage()))
    logger = logging.Logger(module.__name__, logging.INFO)
    logger.addHandler(handler)
    monkeypatch.setattr(module, "logger", logger)
    return records
