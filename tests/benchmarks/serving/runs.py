"""What runs of ``benchmarks.serve`` share, with vLLM itself and with the fake one."""

from __future__ import annotations

from pathlib import Path
from random import Random

from vllm_duo.evaluate.passkey import make_sentence
from vllm_duo.report.serve_results import ServeResults

NEEDLE = Path(__file__).resolve().parents[3] / "models" / "needle"


def results_of(folder: Path) -> ServeResults:
    return ServeResults.model_validate_json((folder / "results.json").read_text())


def write_documents(folder: Path, sentences: int) -> Path:
    """Two texts of so many sentences each, in words that the model knows."""
    for name in ("a.txt", "b.md"):
        rng = Random(name)
        (folder / name).write_text(" ".join(make_sentence(rng) for _ in range(sentences)))
    return folder
