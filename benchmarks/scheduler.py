"""Scheduler work of one step at many running requests, stock against duo, in one run.

Both engines take turns, step by step, with decode steps of all requests; the model is faked
(``simulated_engine.py``), so nothing but vLLM's scheduler and its managers is timed.

    python -m benchmarks.scheduler --tokens 1000 1000000 --out scheduler.json
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import pstats
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.arguments import positive_int, unit_share
from benchmarks.provenance import provenance
from benchmarks.simulated_config import SHAPES, Kind
from benchmarks.simulated_engine import SimulatedEngine, make_engine

KINDS: tuple[Kind, Kind] = ("stock", "duo")
LONG_TOKENS = 100_000
"""From here on prompts share their text and blocks get counted, not computed, hashes."""

PARTS = {
    "schedule": "Scheduler.schedule()",
    "update": "Scheduler.update_from_output()",
    "step": "both",
    "allocate": "allocate_slots(), 1 token each",
    "admit": "get_computed_blocks(), allocate_slots(): 1 new request",
    "free": "free(): 1 request",
    "turnover": "a step, 1 request admitted and 1 freed",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison.

    Attributes:
        shape: the model, a key of ``SHAPES``.
        sparsity: share of the KV heads that stream.
        block_size: tokens of a block.
        tokens: prompt of the shortest request; the others have 1, 2, ... tokens more, so that in
            every step some reach a new block.
        requests: running requests.
        prefix_caching: whether finished blocks may be reused.
        steps: timed steps of each engine.
        warmup: steps before.
        seed: of the prompts.
    """

    shape: str = "llama-3.1-8b"
    sparsity: float = 0.5
    block_size: int = 128
    tokens: int = 1_000
    requests: int = 256
    prefix_caching: bool = False
    steps: int = 200
    warmup: int = 20
    seed: int = 0

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest request at the end, in tokens."""
        return self.tokens + self.requests + 3 * (self.steps + self.warmup)

    @property
    def pool_bytes(self) -> int:
        """A pool in which stock never has to preempt, with some room for new requests."""
        shape = SHAPES[self.shape]
        block_bytes = shape.num_layers * shape.num_kv_heads * shape.head_size * 4 * self.block_size
        return (self.requests + 4) * -(-self.longest_tokens // self.block_size + 1) * block_bytes


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition, by part and kind."""

    seconds: dict[str, dict[Kind, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    def time(self, part: str, kind: Kind, work: Callable[[], Any]) -> Any:
        """Do the work, note its time, return its result."""
        start = perf_counter()
        result = work()
        self.seconds[part][kind].append(perf_counter() - start)
        return result

    def summary(self, warmup: int) -> dict[str, Any]:
        """Median, p10 and p90 in microseconds by part and kind; ratio of the medians."""
        parts: dict[str, Any] = {}
        for part, by_kind in self.seconds.items():
            parts[part] = {}
            for kind, seconds in by_kind.items():
                tenths = statistics.quantiles([1e6 * s for s in seconds[warmup:]], n=10)
                median = 1e6 * statistics.median(seconds[warmup:])
                parts[part][kind] = {"median_us": median, "p10_us": tenths[0], "p90_us": tenths[-1]}
            parts[part]["ratio"] = (
                parts[part]["duo"]["median_us"] / parts[part]["stock"]["median_us"]
            )
        return parts


class Bench:
    """Both engines, filled with running requests that have computed their prompts.

    Args:
        settings: sizes.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.long = settings.tokens >= LONG_TOKENS
        self.numbers = count()
        self.text = list(Random(settings.seed).randbytes(settings.tokens + settings.requests))
        self.engines: dict[Kind, SimulatedEngine] = {kind: self.filled(kind) for kind in KINDS}
        self.times = Times()
        # As vLLM does once an engine has started.
        gc.collect()
        gc.freeze()

    def filled(self, kind: Kind) -> SimulatedEngine:
        """An engine whose requests have all computed their prompts."""
        settings = self.settings
        hashes = count(1)
        engine = make_engine(
            kind,
            settings.shape,
            sparsity=settings.sparsity,
            pool_bytes=settings.pool_bytes,
            block_size=settings.block_size,
            max_model_len=max(2 * settings.tokens, settings.longest_tokens),
            max_num_seqs=settings.requests + 8,
            max_num_batched_tokens=settings.requests * (settings.tokens + settings.requests),
            prefix_caching=settings.prefix_caching,
            hash_function=(lambda _: next(hashes).to_bytes(32)) if self.long else None,
        )
        for index in range(settings.requests):
            self.add(engine, settings.tokens + index)
        while engine.prefilled() < settings.requests:
            if not engine.step().scheduled:
                raise RuntimeError("the pool does not hold all requests")
        return engine

    def add(self, engine: SimulatedEngine, num_tokens: int) -> Any:
        """Queue a request; its salt keeps it from sharing blocks with the others."""
        return engine.add(
            name := str(next(self.numbers)),
            self.text[:num_tokens],
            max_tokens=self.settings.longest_tokens,
            cache_salt=name,
        )

    def turns(self) -> Iterator[tuple[Kind, SimulatedEngine]]:
        """Both engines by turns, each first in every other repetition."""
        for index in range(self.settings.warmup + self.settings.steps):
            for kind in KINDS if index % 2 else KINDS[::-1]:
                yield kind, self.engines[kind]

    def time_steps(self) -> None:
        """Decode steps of all requests through the scheduler."""
        for kind, engine in self.turns():
            scheduler, seconds = engine.scheduler, self.times.seconds
            output = self.times.time("schedule", kind, scheduler.schedule)
            assert output.total_num_scheduled_tokens == self.settings.requests
            answer = engine.sample(output)
            self.times.time(
                "update",
                kind,
                lambda: scheduler.update_from_output(output, answer),  # noqa: B023
            )
            seconds["step"][kind].append(
                seconds["schedule"][kind][-1] + seconds["update"][kind][-1]
            )

    def time_managers(self) -> None:
        """The managers' share alone: a slot for every request, then one request in and out."""
        for kind, engine in self.turns():
            manager, running = engine.manager, engine.scheduler.running

            def allocate(manager: Any = manager, running: Any = running) -> None:
                for request in running:
                    manager.allocate_slots(request, 1)

            self.times.time("allocate", kind, allocate)
            for request in running:
                request.num_computed_tokens += 1
                request.append_output_token_ids(7)
        for kind, engine in self.turns():
            manager = engine.manager
            request = self.add(engine, self.settings.tokens)
            engine.scheduler.waiting.remove_request(request)

            def admit(manager: Any = manager, request: Any = request) -> None:
                blocks, hits, _ = manager.get_computed_blocks(request)
                manager.allocate_slots(request, request.num_tokens - hits, hits, blocks)

            self.times.time("admit", kind, admit)
            self.times.time("free", kind, lambda: manager.free(request))  # noqa: B023
            del engine.scheduler.requests[request.request_id]
        for kind in KINDS:
            of = {part: self.times.seconds[part][kind] for part in ("step", "admit", "free")}
            self.times.seconds["turnover"][kind] = list(map(sum, zip(*of.values(), strict=True)))

    def profile(self, kind: Kind, steps: int = 50) -> str:
        """The functions that take most of a step, by cProfile."""
        engine = self.engines[kind]
        profiler = cProfile.Profile()
        for _ in range(steps):
            output = profiler.runcall(engine.scheduler.schedule)
            answer = engine.sample(output)
            profiler.runcall(engine.scheduler.update_from_output, output, answer)
        lines: list[str] = []
        stats = pstats.Stats(profiler, stream=_Lines(lines)).strip_dirs()  # type: ignore[arg-type]
        stats.sort_stats("tottime").print_stats(22)
        return "".join(lines)


class _Lines:
    """A stream into a list."""

    def __init__(self, lines: list[str]) -> None:
        self.write = lines.append


def compare(settings: Settings, *, profile: bool = False) -> dict[str, Any]:
    """Time both engines; JSON-ready."""
    bench = Bench(settings)
    bench.time_steps()
    if profile:
        for kind in KINDS:
            print(kind, bench.profile(kind))  # noqa: T201
    bench.time_managers()
    summary = bench.times.summary(settings.warmup)
    gc.unfreeze()
    return {"settings": asdict(settings), "parts": summary}


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default=Settings.shape)
    parser.add_argument("--sparsity", type=unit_share, default=Settings.sparsity)
    parser.add_argument("--tokens", type=positive_int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--prefix-caching", choices=["on", "off", "both"], default="both")
    for name in ("block_size", "requests", "steps", "warmup", "seed"):
        flag, default = "--" + name.replace("_", "-"), getattr(Settings, name)
        kind = int if name in ("seed", "warmup") else positive_int
        parser.add_argument(flag, type=kind, default=default, help=f"default: {default}")
    parser.add_argument("--profile", action="store_true", help="print where the time goes")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    results = []
    for tokens in given.tokens:
        for caching in (False, True):
            if given.prefix_caching in ("both", "on" if caching else "off"):
                settings = Settings(
                    shape=given.shape,
                    sparsity=given.sparsity,
                    tokens=tokens,
                    prefix_caching=caching,
                    block_size=given.block_size,
                    requests=given.requests,
                    steps=given.steps,
                    warmup=given.warmup,
                    seed=given.seed,
                )
                results.append(compare(settings, profile=given.profile))
                report(results[-1])
    if given.out is not None:
        record = {"provenance": provenance(), "results": results}
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def report(result: dict[str, Any]) -> None:
    """Print one table a comparison."""
    settings = result["settings"]
    title = (
        f"{settings['requests']} requests of {settings['tokens']:,} tokens, block size "
        f"{settings['block_size']}, prefix caching {'on' if settings['prefix_caching'] else 'off'}"
    )
    table = Table("microseconds: median (p10-p90)", "stock", "duo", "duo / stock", title=title)
    for part, figures in result["parts"].items():
        cells = [
            f"{figures[kind]['median_us']:,.0f} ({figures[kind]['p10_us']:,.0f}-"
            f"{figures[kind]['p90_us']:,.0f})"
            for kind in KINDS
        ]
        table.add_row(PARTS[part], *cells, f"{figures['ratio']:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    raise SystemExit(main())
