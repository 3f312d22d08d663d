"""A whole decode step of vLLM's, stock and duo in turns, and what attention's share of it explains.

    python -m benchmarks.decode_step --context 32768 --out decode_step.json

Each contender is an engine in a process of its own, over the same model with random weights, and holds
one request of ``--context`` tokens. They take turns of ``--steps`` decode steps. Inside, the time in
the attention layers (writing keys and values included) is measured apart: with attention's share f
of stock's step and the ratio r of both attentions, a step that loses nothing elsewhere is
1 / ((1 - f) + f / r) times as fast as stock's. The prompt's attention is left out, as the caches'
contents do not matter for the time of a step; so no answer of these engines means anything.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.arguments import positive_int, unit_share
from benchmarks.provenance import lscpu, provenance

LAYERS, HEADS, HEAD_SIZE, HIDDEN, VOCABULARY = 4, 16, 64, 512, 4096
GOAL = 0.95
"""Of the speed that the attentions alone explain."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One contender; ``sparsity`` None is stock."""

    kv_heads: int
    sparsity: float | None
    context: int
    dtype: str
    threads: int
    compiled: bool

    @property
    def name(self) -> str:
        """For people."""
        return "stock" if self.sparsity is None else f"duo {self.sparsity:.0%}"


def make_model(folder: Path, settings: Settings) -> Path:
    """A Llama's config.json without weights, and a pattern."""
    from vllm_duo.heads.pattern import HeadPattern

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": settings.kv_heads,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": settings.context + 4096,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    count = LAYERS * settings.kv_heads
    values = np.random.default_rng(0).permutation(count).reshape(LAYERS, settings.kv_heads)
    HeadPattern(values=values / (count - 1)).save(folder / "pattern")
    return folder


class AttentionClock:
    """Seconds inside the attention layers; switched off, they leave their output alone."""

    def __init__(self, classes: list[type]) -> None:
        self.seconds = 0.0
        self.on = True
        for cls in classes:
            for name in ("forward", "do_kv_cache_update"):
                if name in vars(cls):
                    setattr(cls, name, self._timed(vars(cls)[name]))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return kwargs.get("output")
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def serve(pipe: Connection, settings: Settings, folder: str) -> None:
    """The contender's process: says when it is ready, then answers a number of steps with times."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    from vllm_duo.attention.impl import DuoAttentionImpl

    model = make_model(Path(folder), settings)
    duo: dict[str, Any] = {}
    if settings.sparsity is not None:
        choice = {"pattern": str(model / "pattern"), "sparsity": settings.sparsity}
        duo = {"attention_backend": "duo", "additional_config": {"duo": choice}}
    llm = LLM(
        model=str(model),
        load_format="dummy",
        dtype=settings.dtype,
        skip_tokenizer_init=True,
        enforce_eager=not settings.compiled,
        max_model_len=settings.context + 2048,
        max_num_seqs=1,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        **duo,
    )
    clock = AttentionClock([CPUAttentionBackendImpl, DuoAttentionImpl])
    prompt = np.random.default_rng(0).integers(3, VOCABULARY, settings.context - 8).tolist()
    parameters = SamplingParams(max_tokens=2000, ignore_eos=True, temperature=0, detokenize=False)
    engine = llm.llm_engine
    clock.on = False
    engine.add_request("only", {"prompt_token_ids": prompt}, parameters)
    for _ in range(-(-len(prompt) // 8192)):
        engine.step()
    clock.on = True
    for _ in range(8):
        engine.step()
    pipe.send("ready")
    while steps := pipe.recv():
        clock.seconds = 0.0
        start = time.perf_counter()
        for _ in range(steps):
            engine.step()
        taken = time.perf_counter() - start
        pipe.send((taken / steps, clock.seconds / steps))


def measure(contenders: list[Settings], rounds: int, steps: int) -> list[dict[str, Any]]:
    """One row per contender; they take turns.

    Raises:
        RuntimeError: an engine died; its own lines above say why.
    """
    context = multiprocessing.get_context("spawn")
    times: list[list[tuple[float, float]]] = [[] for _ in contenders]
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        try:
            for index, settings in enumerate(contenders):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=serve, args=(theirs, settings, f"{folder}/{index}"), daemon=True
                )
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
                _receive(ours, settings)
            for _ in range(rounds):
                for pipe, settings, into in zip(pipes, contenders, times, strict=True):
                    pipe.send(steps)
                    into.append(_receive(pipe, settings))
        finally:
            for pipe in pipes:
                with suppress(OSError):
                    pipe.send(0)
            for process in processes:
                process.join(timeout=20)
                process.kill()
    return [row(settings, taken) for settings, taken in zip(contenders, times, strict=True)]


def _receive(pipe: Connection, settings: Settings) -> Any:
    try:
        return pipe.recv()
    except EOFError as error:
        raise RuntimeError(f"the engine of {settings} died: see its log above") from error


def row(settings: Settings, taken: list[tuple[float, float]]) -> dict[str, Any]:
    """Medians and ranges of one contender, in milliseconds."""
    step = [seconds * 1e3 for seconds, _ in taken]
    attention = [seconds * 1e3 for _, seconds in taken]
    return {
        **asdict(settings),
        "kernels": settings.name,
        "step_ms": statistics.median(step),
        "step_ms_min": min(step),
        "step_ms_max": max(step),
        "attention_ms": statistics.median(attention),
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row its ratio to stock's, the first row's, and what the attentions explain."""
    stock = rows[0]
    share = stock["attention_ms"] / stock["step_ms"]
    for each in rows:
        ratio = stock["attention_ms"] / each["attention_ms"]
        each["attention_share"] = each["attention_ms"] / each["step_ms"]
        each["attention_times_stock"] = ratio
        each["step_times_stock"] = stock["step_ms"] / each["step_ms"]
        each["explained"] = 1 / ((1 - share) + share / ratio)
        each["of_explained"] = each["step_times_stock"] / each["explained"]


def table_of(rows: list[dict[str, Any]]) -> Table:
    """For people."""
    table = Table("KV heads", "kernels")
    for column in ("step ms (range)", "attention ms", "share", "x stock", "explained", "of it"):
        table.add_column(column, justify="right")
    for each in rows:
        table.add_row(
            str(each["kv_heads"]),
            each["kernels"],
            f"{each['step_ms']:.2f} ({each['step_ms_min']:.2f}-{each['step_ms_max']:.2f})",
            f"{each['attention_ms']:.2f}",
            f"{each['attention_share']:.0%}",
            f"{each['step_times_stock']:.2f}",
            f"{each['explained']:.2f}",
            f"{each['of_explained']:.2f}",
        )
    return table


def main() -> int:
    """Measure, print, and write JSON if asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--context", type=positive_int, default=32_768)
    parser.add_argument("--kv-heads", type=positive_int, nargs="+", default=[16, 4])
    parser.add_argument("--sparsity", type=unit_share, nargs="+", default=[0.5])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=positive_int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=positive_int, default=7)
    parser.add_argument("--steps", type=positive_int, default=8)
    parser.add_argument("--compiled", action="store_true", help="without --enforce-eager")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{arguments.threads - 1}")
    rows: list[dict[str, Any]] = []
    for kv_heads in arguments.kv_heads:
        contenders = [
            Settings(
                kv_heads=kv_heads,
                sparsity=sparsity,
                context=arguments.context,
                dtype=arguments.dtype,
                threads=arguments.threads,
                compiled=arguments.compiled,
            )
            for sparsity in (None, *arguments.sparsity)
        ]
        measured = measure(contenders, arguments.rounds, arguments.steps)
        compare(measured)
        rows += measured
    console = Console()
    console.width = max(console.width, 110)
    console.print(table_of(rows))
    if arguments.out:
        result = {**provenance(), "goal": GOAL, "steps": rows, "lscpu": lscpu()}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
