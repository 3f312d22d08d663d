"""Loggers below vLLM's own, so that its handlers and levels apply."""

from __future__ import annotations

import logging


def get_logger(name: str) -> logging.Logger:
    """Logger of a module of this package; vLLM configures only names below ``vllm``."""
    return logging.getLogger(f"vllm.{name}")
