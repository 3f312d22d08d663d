"""A small run of ``benchmarks.serve`` with the fake vLLM of ``fake_vllm.py``."""

from __future__ import annotations

import sys
from pathlib import Path

FAKE = [sys.executable, str(Path(__file__).with_name("fake_vllm.py"))]
FLAGS = (
    "--lengths 128 --output-tokens 4 --requests 4 --concurrencies 2 --rounds 2 --passkey-share 0.5"
)
