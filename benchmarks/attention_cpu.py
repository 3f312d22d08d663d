"""CPU attention with this package's kernels against stock vLLM's, alternating in one run.

    python -m benchmarks.attention --device cpu --threads 1 2 --out attention.json

A correctness gate comes first: both serve the same requests and must agree, else nothing is timed.
Layers
take turns, so that their caches come from memory and not from the processor's caches. Bandwidth and
matrix multiplication are measured in the same run, with the same threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.arguments import positive_int
from benchmarks.attention_layers import DuoLayer, Shape, StockLayer
from benchmarks.provenance import lscpu, provenance
from vllm_duo.kv_cache.formats import FORMATS
from vllm_duo.ops import cpu

LAYERS_BYTES = 128 << 20
"""Layers of a contender take turns over so many bytes, several times the largest cache of a laptop."""

PREFILL_TOKENS, PREFILL_CHUNK = 16_384, 2048


GATE_ERRORS = {"e4m3": 0.075, "e5m2": 0.142, "int8": 0.016, "int4": 0.293}
"""What quantising may change a result by, of its size: twice what it does in the gate's own case."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Layers that run one after another, each with this share of streaming heads; none is stock."""

    name: str
    sparsities: tuple[float, ...] = ()
    context: int | None = None  # in place of the case's
    kv_cache_dtype: str = "auto"

    def shape(self, case: Case) -> Shape:
        """The case's shape, with this contender's context and cache."""
        shape = replace(case.shape, kv_cache_dtype=self.kv_cache_dtype)
        return shape if self.context is None else replace(shape, context=self.context)

    def streaming(self, shape: Shape) -> list[int]:
        """Streaming KV heads of each layer."""
        return [round(share * shape.num_kv_heads) for share in self.sparsities or (0.0,)]

    def layers(self, shape: Shape) -> list[DuoLayer | StockLayer]:
        """The layers, with caches of their own."""
        if not self.sparsities:
            return [StockLayer(shape)]
        return [DuoLayer(shape, streaming) for streaming in self.streaming(shape)]


STOCK = Contender(name="stock")
EVERY = Contender(name="duo 0%", sparsities=(0.0,))
HALF = Contender(name="duo 50%", sparsities=(0.5,))
QUARTER = Contender(name="duo 75%", sparsities=(0.75,))
AT_4K = Contender(name="duo at 4k", sparsities=(1.0,), context=(4 << 10) - 1)
AT_1M = Contender(name="duo at 1M", sparsities=(1.0,), context=(1 << 20) - 1)
MIXED = Contender(name="duo mixed", sparsities=(0.5, 0.5))
QUANTISED = tuple(
    Contender(name=f"duo 50% {name}", sparsities=(0.5,), kv_cache_dtype=name)
    for name in FORMATS
    if name != "fp8_e4m3"  # another name of fp8
)
EXCLUSIVE = Contender(name="duo exclusive", sparsities=(0.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Contenders that take turns; ratios are to the first of several."""

    name: str
    shape: Shape
    contenders: tuple[Contender, ...] = (STOCK, EVERY, HALF, QUARTER)
    rounds: int = 9


def gate(dtype: torch.dtype, num_heads: int, num_kv_heads: int, sparsity: float) -> float:
    """Serve a request from nothing with both; within sink + recent the classes must agree too.

    Returns:
        The largest difference.

    Raises:
        RuntimeError: the results differ.
    """
    chunks = (150, 1, 700, 1) if sparsity == 0 else (150, 1, 100, 1)
    shape = Shape(
        dtype=dtype,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        context=0,
        chunk=sum(chunks),
        requests=2,
    )
    layers = (DuoLayer(shape, round(sparsity * num_kv_heads)), StockLayer(shape))
    bound = 2e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    context, largest = 0, 0.0
    for seed, chunk in enumerate(chunks):
        step = replace(shape, context=context, chunk=chunk)
        ours, theirs = (layer.step(step, seed)().float() for layer in layers)
        error = (ours - theirs).abs().max().item()
        if not error <= bound:
            raise RuntimeError(
                f"gate: {dtype}, {num_heads}/{num_kv_heads} heads, sparsity {sparsity}, {chunk} tokens "
                f"after {context}: results differ by {error}, expected at most {bound}"
            )
        context, largest = context + chunk, max(largest, error)
    return largest


def gate_quantised(name: str) -> None:
    """Serve a request from nothing in two chunks with a quantised cache and with one that is not.

    Raises:
        RuntimeError: the results are further apart than the format explains.
    """
    shape = Shape(
        dtype=torch.float32, num_heads=8, num_kv_heads=2, context=0, chunk=1000, kv_cache_dtype=name
    )
    results = []
    for own in (shape, replace(shape, kv_cache_dtype="auto")):
        layer = DuoLayer(own, 1)
        chunks = [replace(own, chunk=600), replace(own, context=600, chunk=400)]
        results.append(torch.cat([layer.step(chunk, i)() for i, chunk in enumerate(chunks)]))
    error = (results[0] - results[1]).square().mean().sqrt() / results[1].square().mean().sqrt()
    bound = GATE_ERRORS[FORMATS[name].number]
    if not error <= bound:
        raise RuntimeError(
            f"gate: {name}: results differ by {error:.3f} of their size, expected at most {bound}"
        )


def work_of(case: Case, contender: Contender) -> Callable[[], object]:
    """A call that runs the next layers' work."""
    shape = contender.shape(case)
    if case.name in ("prefill", "quantised prefill"):
        (layer,) = contender.layers(shape)
        chunks = [
            layer.step(replace(shape, context=begin, chunk=min(PREFILL_CHUNK, shape.chunk - begin)))
            for begin in range(0, shape.chunk, PREFILL_CHUNK)
        ]
        return lambda: [step() for step in chunks]
    needed = sum(map(shape.needed_bytes, contender.streaming(shape)))
    count = max(2, min(64, -(-LAYERS_BYTES // needed)))
    turns = itertools.cycle(
        [[layer.step(shape, seed) for layer in contender.layers(shape)] for seed in range(count)]
    )
    return lambda: [step() for step in next(turns)]


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Mean seconds of one call."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def alternate(works: list[Callable[[], object]], rounds: int, slice_s: float) -> list[list[float]]:
    """Seconds of each, in turns, after a warm-up; a call is repeated to fill its slice."""
    repeats = []
    for work in works:
        first = seconds(work, 1)
        if first < slice_s:
            first = seconds(work, 1)
        repeats.append(max(1, min(500, int(slice_s / first))))
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, count, into in zip(works, repeats, times, strict=True):
            into.append(seconds(work, count))
    return times


def machine_limits() -> dict[str, float]:
    """Read bandwidth in GB/s and multiplication in GFLOP/s, best of several, with torch's threads."""
    data = torch.ones(1 << 26)
    read = min(seconds(data.sum, 1) for _ in range(9))
    found = {"read_gb_s": data.nbytes / read / 1e9}
    # Without instructions for bf16 its multiplication takes seconds at 1024.
    small = "avx512_bf16" not in lscpu().split()
    for dtype, name, n in (
        (torch.float32, "sgemm_gflop_s", 1024),
        (torch.bfloat16, "bf16_gemm_gflop_s", 256 if small else 1024),
    ):
        a = torch.randn(n, n).to(dtype)
        multiply = min(seconds(lambda: a @ a, 1) for _ in range(7))  # noqa: B023
        found[name] = 2 * n**3 / multiply / 1e9
    return found


def cases(smoke: bool) -> list[Case]:
    """Every case, in the order in which it runs."""
    found = []
    context = 2048 if smoke else 16_384
    for dtype in (torch.float32, torch.bfloat16):
        for heads in ((16, 16), (32, 8)):

            def shape(dtype: torch.dtype = dtype, heads: Any = heads, **sizes: int) -> Shape:
                return Shape(dtype=dtype, num_heads=heads[0], num_kv_heads=heads[1], **sizes)

            found.append(Case(name="decode", shape=shape(context=context - 1, chunk=1)))
            decode = shape(context=context - 1, chunk=1)
            found.append(Case(name="quantised", shape=decode, contenders=(HALF, *QUANTISED)))
            both = shape(context=context - 1, chunk=1)
            found.append(Case(name="exclusive", shape=both, contenders=(MIXED, EXCLUSIVE)))
            for length, requests in itertools.product((128, 1024), (1, 8, 64)):
                short = shape(context=length - 1, chunk=1, requests=requests)
                found.append(Case(name="short", shape=short, contenders=(STOCK, HALF)))
            prefill = replace(
                shape(context=0, chunk=3000 if smoke else PREFILL_TOKENS), num_heads=16
            )
            prefill = replace(prefill, num_kv_heads=16 if heads[0] == 16 else 4)
            found.append(Case(name="prefill", shape=prefill, rounds=3))
            contenders = (HALF, *QUANTISED)
            found.append(replace(found[-1], name="quantised prefill", contenders=contenders))
            constant = shape(context=0, chunk=1)
            found.append(Case(name="streaming", shape=constant, contenders=(AT_4K, AT_1M)))
    return [replace(case, rounds=1) for case in found] if smoke else found


def measure(case: Case, limits: dict[str, float]) -> list[dict[str, Any]]:
    """One row per contender."""
    works = [work_of(case, contender) for contender in case.contenders]
    times = alternate(works, case.rounds, slice_s=0.05)
    medians = [statistics.median(taken) for taken in times]
    rows = []
    for contender, taken, median in zip(case.contenders, times, medians, strict=True):
        shape = contender.shape(case)
        streaming = contender.streaming(shape)
        needed = sum(map(shape.needed_bytes, streaming)) / median / 1e9
        rows.append(
            {
                "case": case.name,
                **asdict(shape),
                "dtype": str(shape.dtype).removeprefix("torch."),
                "kernels": contender.name,
                "sparsities": contender.sparsities,
                "threads": torch.get_num_threads(),
                "median_ms": median * 1e3,
                "min_ms": min(taken) * 1e3,
                "max_ms": max(taken) * 1e3,
                "times_first": medians[0] / median,
                "gb_s": needed,
                "share_of_read": needed / limits["read_gb_s"],
                "gflop_s": sum(map(shape.operations, streaming)) / median / 1e9,
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    """For people."""
    table = Table("case", "dtype", "heads", "requests x tokens", "threads", "kernels")
    for column in ("ms (range)", "x first", "GB/s", "GFLOP/s"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["case"],
            row["dtype"],
            f"{row['num_heads']}/{row['num_kv_heads']}",
            f"{row['requests']} x {row['context'] + row['chunk']}",
            str(row["threads"]),
            row["kernels"],
            f"{row['median_ms']:.3f} ({row['min_ms']:.3f}-{row['max_ms']:.3f})",
            f"{row['times_first']:.2f}",
            f"{row['gb_s']:.1f}" if row["chunk"] == 1 else "",
            f"{row['gflop_s']:.1f}",
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write JSON if asked for."""
    parser = argparse.ArgumentParser("benchmarks.attention", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--smoke", action="store_true", help="short contexts, one round")
    parser.add_argument(
        "--threads", type=positive_int, nargs="+", default=[torch.get_num_threads()]
    )
    parser.add_argument("--only", nargs="+", help="cases of these names alone")
    parser.add_argument("--dtype", nargs="+", help="float32, bfloat16 or both")
    arguments = parser.parse_args(argv)
    console = Console()
    console.width = max(console.width, 130)
    for dtype, heads, sparsity in itertools.product(
        (torch.float32, torch.bfloat16), ((16, 16), (32, 8), (16, 4)), (0.0, 0.5)
    ):
        gate(dtype, *heads, sparsity)
    for name in FORMATS:
        gate_quantised(name)
    rows: list[dict[str, Any]] = []
    limits = {}
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        limits[threads] = machine_limits()
        console.print(cpu.describe(), {k: round(v, 1) for k, v in limits[threads].items()})
        for case in cases(arguments.smoke):
            name = str(case.shape.dtype).removeprefix("torch.")
            if case.name in (arguments.only or [case.name]) and name in (arguments.dtype or [name]):
                rows += measure(case, limits[threads])
    console.print(table_of(rows))
    if arguments.out:
        result = {
            **provenance(),
            "kernels": cpu.describe(),
            "limits": limits,
            "cases": rows,
            "lscpu": lscpu(),
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0
