"""Time to the first token with a prompt's prefix in files, in the pool, and nowhere.

A random Llama checkpoint of a given size is served offline and eagerly, every server in a process of
its own: one without the storage connector, one that stores, and one that is started after it and
loads. Prompts differ, so nothing but the prompt itself can be hit.

    python -m benchmarks.kv_storage --out benchmarks/results/kv_storage.json
    python -m benchmarks.kv_storage --smoke
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.provenance import provenance

KINDS = ("without", "stores", "pool", "loads")
"""No connector; one that finds nothing; again, from the pool; after a restart, from files."""
VOCABULARY = 32_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison.

    Attributes:
        lengths: of prompts, in tokens.
        repeats: prompts of each length.
        layers: of the model.
        hidden_size: of the model; heads have 128 numbers, 4 query heads share a KV head.
        dtype: of weights and KV cache.
        block_size: in tokens.
    """

    lengths: tuple[int, ...] = (2_048, 8_192, 16_384)
    repeats: int = 3
    layers: int = 4
    hidden_size: int = 1_024
    dtype: str = "bfloat16"
    block_size: int = 128

    def prompts(self) -> list[list[int]]:
        """Token ids, the lengths by turns."""
        rng = random.Random(0)
        lengths = self.lengths * self.repeats
        return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def make_checkpoint(settings: Settings, folder: Path) -> None:
    """Write random weights, and a pattern by which half of the KV heads stream."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = settings.hidden_size // 128
    kv_heads = max(heads // 4, 2)
    config = LlamaConfig(
        hidden_size=settings.hidden_size,
        intermediate_size=4 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        vocab_size=VOCABULARY,
        max_position_embeddings=max(settings.lengths) + 64,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(getattr(torch, settings.dtype))
    model.save_pretrained(folder / "model")
    pattern = folder / "model" / "duo_pattern"
    pattern.mkdir()
    table = np.tile([1.0, 0.0], (settings.layers, kv_heads // 2))
    np.savetxt(pattern / "full_attention_heads.tsv", table, delimiter="\t")


def run_server(settings: Settings, folder: Path, kind: str) -> dict[str, Any]:
    """One server's times, in this process; prompts come one after another."""
    from vllm import LLM, SamplingParams

    from vllm_duo.kv_transfer import CONNECTOR, MODULE

    transfer = {}
    if kind != "without":
        transfer["kv_transfer_config"] = {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": MODULE,
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"path": str(folder / "kv"), "max_bytes": 1 << 36},
        }
    llm = LLM(
        model=str(folder / "model"),
        attention_backend="duo",
        dtype=settings.dtype,
        block_size=settings.block_size,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=True,
        # vLLM asks for so much of the memory to be free, however small the pool is.
        gpu_memory_utilization=0.5,
        **transfer,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False)

    def first_token(prompt: list[int]) -> tuple[float, int, int]:
        start = time.perf_counter()
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        return seconds, output.num_cached_tokens or 0, output.outputs[0].token_ids[0]

    first_token([7] * 300)  # what is compiled or allocated at the first request
    prompts = settings.prompts()
    rounds = {kind: prompts} | ({"pool": prompts} if kind == "stores" else {})
    found = {}
    for name, asked in rounds.items():
        if name == "pool":
            time.sleep(5)  # what is still being written
        answers = [first_token(prompt) for prompt in asked]
        found[name] = [
            {"tokens": len(prompt), "seconds": seconds, "cached": cached, "first": first}
            for prompt, (seconds, cached, first) in zip(asked, answers, strict=True)
        ]
    return found


def summary(settings: Settings, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Median, least and greatest seconds by length and kind."""
    rows = []
    for length in settings.lengths:
        for kind in KINDS:
            of_length = [each for each in found[kind] if each["tokens"] == length]
            seconds = [each["seconds"] for each in of_length]
            rows.append(
                {
                    "tokens": length,
                    "kind": kind,
                    "median_s": statistics.median(seconds),
                    "min_s": min(seconds),
                    "max_s": max(seconds),
                    "cached_tokens": sorted({each["cached"] for each in of_length}),
                }
            )
    return rows


def main() -> int:
    """Measure, check that all servers gave the same first tokens, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--server", nargs=2, metavar=("KIND", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = Settings()
    # vLLM's automatic binding keeps a core, one more with a connector: threads would differ.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
    if args.smoke:
        settings = Settings(lengths=(300, 600), repeats=1, layers=2, hidden_size=256)
    if args.server:
        kind, folder = args.server
        found = run_server(settings, Path(folder), kind)
        (Path(folder) / f"{kind}.json").write_text(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, list[dict[str, Any]]] = {}
        make_checkpoint(settings, folder)
        # Once more at the end: the machine may have become faster or slower.
        for kind in ("without", "stores", "loads", "without"):
            command = [sys.executable, "-m", "benchmarks.kv_storage", "--server", kind, name]
            subprocess.run(command + ["--smoke"] * args.smoke, check=True, env=os.environ)
            for own, answers in json.loads((folder / f"{kind}.json").read_text()).items():
                found.setdefault(own, []).extend(answers)
        files = [path for path in (folder / "kv").glob("*/*/*") if path.is_file()]
        stored_bytes = sum(path.stat().st_size for path in files)
    count = len(settings.prompts())
    tokens = {
        tuple(each["first"] for each in found[kind][first : first + count])
        for kind in KINDS
        for first in range(0, len(found[kind]), count)
    }
    if len(tokens) != 1:
        raise SystemExit(f"expected the same first tokens of all servers, got {tokens}")
    rows = summary(settings, found)
    result = {
        "settings": asdict(settings),
        "provenance": provenance(),
        "threads_bind": os.environ["VLLM_CPU_OMP_THREADS_BIND"],
        "stored_bytes": stored_bytes,
        "rows": rows,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    console = Console(highlight=False)
    for row in rows:
        console.print(
            f"{row['tokens']:6d} {row['kind']:8s} {row['median_s']:8.3f} s "
            f"({row['min_s']:.3f}-{row['max_s']:.3f}), cached {row['cached_tokens']}",
            markup=False,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
