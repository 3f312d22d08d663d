"""`make demo` as a person runs it, set-up done."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.needle import SERVER_ENV

pytestmark = pytest.mark.engine
ROOT = Path(__file__).resolve().parents[2]


def test_demo_finds_the_key_and_reads_the_bytes_from_the_engine():
    done = subprocess.run(
        [sys.executable, "tools/demo.py"],
        cwd=ROOT,
        env={**os.environ, **SERVER_ENV, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"pass key \d{5}: found", done.stdout)
    rows = dict(re.findall(r"│ (.*?) +│ +([\d,]+) │", done.stdout))
    held = {name: int(size.replace(",", "")) for name, size in rows.items()}
    tokens = int(re.search(r"this request of (\d+) tokens", done.stdout).group(1))
    # A prompt of 1,950 tokens and what was generated until the engine was read.
    assert 1900 <= tokens <= 1960 + 6000
    # Retrieval blocks of 128 tokens, 8 heads of 256 bytes a token; the 16 + 64 streaming slots of the
    # other 8 heads fit one such block.
    block = 8 * 128 * 256
    blocks = -(-tokens // 128)
    # The scheduler takes a block before the token that needs it has come.
    needed = {blocks * block, -(-(tokens + 1) // 128) * block}
    assert held["duo, retrieval heads (read from the engine)"] in needed
    assert held["duo, streaming heads (read from the engine)"] == block
    assert held["stock vLLM, all heads in full (by its block size)"] == blocks * 2 * block
    for step in (
        "make serve",
        "curl -s localhost:8000/v1/completions",
        "from openai import OpenAI",
    ):
        assert step in done.stdout
