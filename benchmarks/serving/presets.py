"""Ready-made settings: a quick look that all works, and a benchmark for two cores without a GPU."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.settings import Point
from vllm_duo.heads import HeadPattern

ROOT = Path(__file__).resolve().parents[2]
NEEDLE = ROOT / "models" / "needle"
LAYERS, HEADS, HIDDEN, HEAD_SIZE = 4, 16, 512, 64
MAX_MODEL_LEN = 20_480


@dataclass(frozen=True)
class Preset:
    """Settings that flags may still change.

    Attributes:
        summary: one line.
        settings: values of ``Settings``.
        prepare: makes the model in a folder of the run and returns its path; None: as given.
    """

    summary: str
    settings: dict[str, Any]
    prepare: Callable[[Path], Path] | None = None


def smoke() -> Preset:
    """Both sides eager on the needle model, two small points; under three minutes on two cores."""
    points = [
        Point(workload="random", prompt_tokens=512, output_tokens=16, requests=8, concurrency=4),
        Point(workload="shared-prefix", prompt_tokens=512, output_tokens=16, requests=8, rate=4.0),
    ]
    return Preset(
        summary="the needle model, both sides eager, two points: under three minutes on two cores",
        settings={
            "model": os.path.relpath(NEEDLE),
            "sparsities": (0.5,),
            "points": tuple(points),
            "rounds": 1,
            "passkey_share": 0.25,
            "enforce_eager": True,
            "server_args": ("--dtype", "float32", "--max-model-len", "2048"),
            "env": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        },
    )


def two_core() -> Preset:
    """Prompts of 1k, 4k and 16k tokens on a model with random weights; no GPU."""
    return Preset(
        summary="random weights (4 layers, hidden 512, 16 heads of 64), prompts of 1k, 4k and 16k",
        settings={
            "sparsities": (0.5, 0.75),
            "points": tuple(_two_core_points()),
            "rounds": 2,
            "passkey_share": 0.0,
            "server_args": (
                *("--load-format", "dummy", "--dtype", "float32"),
                *("--max-model-len", str(MAX_MODEL_LEN)),
            ),
            "env": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"},
        },
        prepare=make_dummy_model,
    )


def _two_core_points() -> Iterator[Point]:
    """The pool of 1 GiB holds 32,768 tokens of stock: 7 requests of the closed loop of 8 at 4k."""
    loads: tuple[tuple[int, int, dict[str, Any]], ...] = (
        (1024, 8, {"concurrency": 1}),
        (1024, 16, {"concurrency": 8}),
        (1024, 12, {"rate": 0.4}),
        (4096, 4, {"concurrency": 1}),
        (4096, 8, {"concurrency": 8}),
        (16384, 2, {"concurrency": 2}),
    )
    for tokens, requests, load in loads:
        yield Point(
            workload="random", prompt_tokens=tokens, output_tokens=64, requests=requests, **load
        )


def make_dummy_model(folder: Path) -> Path:
    """A Llama's config.json without weights, the needle model's tokenizer, and a random pattern.

    ``--load-format dummy`` gives it random weights: its answers mean nothing, and any pattern costs
    the same time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": MAX_MODEL_LEN,
        "vocab_size": json.loads((NEEDLE / "config.json").read_text())["vocab_size"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NEEDLE / name, folder / name)
    values = np.random.default_rng(0).permutation(LAYERS * HEADS).reshape(LAYERS, HEADS)
    pattern = HeadPattern(values=values / (LAYERS * HEADS - 1))
    pattern.save(folder / "duo_pattern")
    return folder


PRESETS: dict[str, Callable[[], Preset]] = {"smoke": smoke, "two-core": two_core}
