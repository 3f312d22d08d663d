"""The scenarios of ``prefix_caching`` with the model faked: seconds a run, at full model shapes.

vLLM's scheduler, managers and block pool are real (``simulated_engine.py``); the hits are those that
a server would report for the same requests.

    python -m benchmarks.prefix_simulated --out benchmarks/results/prefix_simulated.json
    python -m benchmarks.prefix_simulated --policies
    python -m benchmarks.prefix_simulated --eagle-head --out benchmarks/results/prefix_eagle_head.json
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.arguments import positive_int
from benchmarks.prefix_policies import POLICIES, kept_of_answer, policy
from benchmarks.prefix_scenarios import Scenario, at_once, chats, users
from benchmarks.provenance import provenance
from benchmarks.simulated_config import EAGLE_HEAD, SHAPES, Kind
from benchmarks.simulated_engine import SimulatedEngine, make_engine
from vllm_duo.kv_cache.manager import RingManager

SCENARIOS = {
    "chats": chats,
    "chats in rounds": lambda seed: chats(seed, rounds=True),
    "4 chats at once": lambda seed: chats(seed, wave=4),
    "users": users,
    "at once": at_once,
}
THIRD = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """One engine and the scenarios that run on it, one after another.

    Attributes:
        scenarios: keys of ``SCENARIOS``.
        block_size: in tokens.
        seed: of the scenarios.
        share: the pool is what stock needs to keep all of it, divided by this.
        shape: the model, a key of ``SHAPES``.
        sparsity: share of the KV heads that stream.
        chunk_tokens: most tokens of a step.
        eagle_head: one drafts, so that vLLM drops the last block of every hit; all drafts are wrong.
    """

    scenarios: tuple[str, ...]
    block_size: int = 16
    seed: int = 0
    share: int = 1
    shape: str = "llama-3.1-8b"
    sparsity: float = 0.5
    chunk_tokens: int = 2_048
    eagle_head: bool = False

    def made(self) -> list[Scenario]:
        """The scenarios."""
        return [SCENARIOS[name](self.seed) for name in self.scenarios]

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pool, for both kinds."""
        shape = SHAPES[self.shape]
        block_bytes = shape.num_layers * shape.num_kv_heads * shape.head_size * 4 * self.block_size
        blocks = sum(scenario.kept_blocks(self.block_size) for scenario in self.made()) + 1
        return blocks // self.share * block_bytes


def hits_of(case: Case, kind: Kind) -> dict[str, Any]:
    """Hits by scenario, and what the pool holds and keeps at the end; JSON-ready."""
    scenarios = case.made()
    engine = make_engine(
        kind,
        case.shape,
        sparsity=case.sparsity,
        pool_bytes=case.pool_bytes,
        block_size=case.block_size,
        max_model_len=max(scenario.longest_tokens for scenario in scenarios) + 1,
        max_num_seqs=64,
        max_num_batched_tokens=case.chunk_tokens,
        prefix_caching=True,
        num_speculative_tokens=3 if case.eagle_head else 0,
        eagle_head=EAGLE_HEAD if case.eagle_head else None,
    )
    results = {
        name: _run(engine, scenario, name)
        for name, scenario in zip(case.scenarios, scenarios, strict=True)
    }
    return {
        "scenarios": results,
        "hit_tokens": sum(result["hit_tokens"] for result in results.values()),
        "prompt_tokens": sum(result["prompt_tokens"] for result in results.values()),
        "pool_blocks": engine.manager.block_pool.num_gpu_blocks,
        "cached_blocks": _cached_blocks(engine),
    }


def _run(engine: SimulatedEngine, scenario: Scenario, name: str) -> dict[str, int]:
    histories: dict[str, list[int]] = {}
    hits = prompt_tokens = preempted = peak = 0
    number = 0
    for wave in scenario.waves:
        for ask in wave:
            prompt = histories.get(ask.chat, []) + list(ask.tokens)
            answer = [(number * 7 + index * 13) % 590 + 3 for index in range(ask.answer_tokens)]
            engine.add(f"{name} {number}", prompt, outputs=answer)
            histories[ask.chat] = prompt + answer
            prompt_tokens += len(prompt)
            number += 1
        while engine.scheduler.get_num_unfinished_requests():
            step = engine.step()
            hits += sum(step.hits.values())
            preempted += len(step.preempted)
            peak = max(peak, engine.manager.block_pool.num_gpu_blocks - engine.num_free_blocks)
    return {
        "hit_tokens": hits,
        "prompt_tokens": prompt_tokens,
        "preemptions": preempted,
        "peak_held_blocks": peak,
    }


def _cached_blocks(engine: SimulatedEngine) -> dict[str, int]:
    """Blocks that are kept for hits and held by nobody, by class."""
    streaming = {
        manager.kv_cache_group_id
        for manager in engine.manager.coordinator.single_type_managers
        if isinstance(manager, RingManager)
    }
    kept = {"retrieval": 0, "snapshots": 0}
    for block in engine.manager.block_pool.blocks:
        if block.block_hash is not None and block.ref_cnt == 0:
            group = int.from_bytes(block.block_hash[-4:], "big")
            kept["snapshots" if group in streaming else "retrieval"] += 1
    return kept


def cases(seeds: range) -> Iterator[Case]:
    """Each scenario alone and all three on one engine, in both pools.

    A third of what requests of 10,000 shared tokens take does not hold one of them, stock or duo, so
    that scenario comes with the others only.
    """
    together = ("chats", "users", "at once")
    for block_size in (16, 128):
        for seed in seeds:
            for names in [together, *((name,) for name in SCENARIOS)]:
                for share in (1, THIRD):
                    if share == 1 or names != ("at once",):
                        yield Case(scenarios=names, block_size=block_size, seed=seed, share=share)


def compare_kinds(seeds: range, console: Console) -> list[dict[str, Any]]:
    """Stock against duo."""
    rows = []
    table = Table("block", "pool", "scenarios", "stock", "duo / stock", "snapshots / cached blocks")
    grouped: dict[tuple[int, int, str], list[dict[str, Any]]] = {}
    for case in cases(seeds):
        row = {"case": asdict(case), "stock": hits_of(case, "stock"), "duo": hits_of(case, "duo")}
        row["ratio"] = row["duo"]["hit_tokens"] / max(row["stock"]["hit_tokens"], 1)
        rows.append(row)
        key = case.block_size, case.share, ", ".join(case.scenarios)
        grouped.setdefault(key, []).append(row)
    for (block_size, share, names), found in grouped.items():
        ratios = [row["ratio"] for row in found]
        stock = [row["stock"]["hit_tokens"] / row["stock"]["prompt_tokens"] for row in found]
        kept = found[0]["duo"]["cached_blocks"]
        table.add_row(
            *(str(block_size), "full" if share == 1 else "third", names),
            f"{min(stock):.1%}-{max(stock):.1%}",
            f"{min(ratios):.3f}-{max(ratios):.3f}",
            f"{kept['snapshots']} / {sum(kept.values())}",
        )
    console.print(table)
    return rows


def compare_policies(seeds: range, console: Console) -> list[dict[str, Any]]:
    """Duo with each policy, as a share of stock's hits, the least over the seeds."""
    rows = []
    names = ("chats", "chats in rounds", "users", "at once")
    for block_size in (16, 128):
        columns = [(name, share) for name in names for share in (1, THIRD)][:-1]
        table = Table("policy", *(f"{n}, {'full' if s == 1 else 'third'}" for n, s in columns))
        stock: dict[Case, int] = {}
        for label in POLICIES:
            cells = []
            for name, share in columns:
                ratios = []
                for seed in seeds:
                    case = Case(scenarios=(name,), block_size=block_size, seed=seed, share=share)
                    if case not in stock:
                        stock[case] = hits_of(case, "stock")["hit_tokens"]
                    with policy(label):
                        ratios.append(hits_of(case, "duo")["hit_tokens"] / max(stock[case], 1))
                    rows.append({"policy": label, "case": asdict(case), "ratio": ratios[-1]})
                cells.append(f"{min(ratios):.3f}")
            table.add_row(label, *cells)
        table.title = f"hits as a share of stock's, block size {block_size}"
        console.print(table)
    return rows


def compare_kept_of_answer(seeds: range, console: Console) -> list[dict[str, Any]]:
    """Chats with an EAGLE head: one and two snapshots of an answer, as shares of stock's hits."""
    rows = []
    table = Table("block", "pool", "one snapshot", "two", title="hits as a share of stock's")
    for block_size in (16, 128):
        for share in (1, THIRD):
            ratios: dict[int, list[float]] = {1: [], 2: []}
            for seed in seeds:
                case = Case(
                    scenarios=("chats",),
                    block_size=block_size,
                    seed=seed,
                    share=share,
                    eagle_head=True,
                )
                stock = hits_of(case, "stock")["hit_tokens"]
                for kept, found in ratios.items():
                    with kept_of_answer(kept):
                        found.append(hits_of(case, "duo")["hit_tokens"] / max(stock, 1))
                    row = {"case": asdict(case), "kept_of_answer": kept, "ratio": found[-1]}
                    rows.append(row)
            pool = "full" if share == 1 else "third"
            cells = (f"{min(found):.3f}-{max(found):.3f}" for found in ratios.values())
            table.add_row(str(block_size), pool, *cells)
    console.print(table)
    return rows


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=positive_int, default=3, help="seeds 0, 1, ...; default: 3")
    instead = parser.add_mutually_exclusive_group()
    for flag, compare, what in (
        ("--policies", compare_policies, "policies"),
        ("--eagle-head", compare_kept_of_answer, "what is kept for one"),
    ):
        instead.add_argument(
            flag,
            dest="compare",
            action="store_const",
            const=compare,
            help=f"compare {what} instead",
        )
    parser.set_defaults(compare=compare_kinds)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    console = Console(width=130)
    rows = given.compare(range(given.seeds), console)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"provenance": provenance(), "rows": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    raise SystemExit(main())
