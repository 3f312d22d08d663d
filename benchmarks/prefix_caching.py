"""Prefix-cache hits through the served API, stock vLLM against duo, in pools of equal bytes.

Three scenarios, one after another on the same server: interleaved chats, users of one system prompt,
and requests that share most of their prompt and arrive at once. Each server is started twice: with a
pool in which stock keeps all of it, and with a third of that pool. Hits are the cached tokens that the
API returns. Afterwards every prompt is sent again under a ``cache_salt`` of its own, which nothing can
hit: the answers must be the same.

    python -m benchmarks.prefix_caching --out benchmarks/results/prefix_caching.json
    python -m benchmarks.prefix_caching --smoke
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.arguments import positive_int
from benchmarks.prefix_api import ColdAnswers, Served, run_scenario, serve
from benchmarks.prefix_scenarios import Scenario, at_once, chats, users
from benchmarks.provenance import provenance

Kind = Literal["stock", "duo"]
MODEL = Path(__file__).resolve().parents[1] / "models" / "needle"
POOLS = {"full": 1, "third": 3}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison.

    Attributes:
        block_size: of both servers, in tokens; vLLM's own CPU attention takes multiples of 32.
        seed: of all scenarios.
        sparsity: share of the KV heads that stream.
        chunk_tokens: most tokens of a step.
        wave: chats that send at once.
        cold_every: every so many answers are compared with those of a cold cache.
        smoke: a small version of every scenario, in the full pool only.
    """

    block_size: int = 32
    seed: int = 0
    sparsity: float = 0.5
    chunk_tokens: int = 2_048
    wave: int = 4
    cold_every: int = 1
    smoke: bool = False

    def scenarios(self) -> list[Scenario]:
        """The three scenarios; answers of (b) and (c), whose lengths decide nothing, are short."""
        if self.smoke:
            return [
                chats(self.seed, wave=2, count=4, turns=3),
                users(self.seed, system_tokens=600, count=6, answer_tokens=4),
                at_once(self.seed, shared_tokens=1_500, count=4, answer_tokens=4),
            ]
        return [
            chats(self.seed, wave=self.wave),
            users(self.seed, answer_tokens=16),
            at_once(self.seed, answer_tokens=16),
        ]


def run_part(
    settings: Settings, kind: Kind, pool: str, cold: ColdAnswers, console: Console
) -> dict[str, Any]:
    """One server's hits and answers."""
    scenarios = settings.scenarios()
    stock_blocks = sum(scenario.kept_blocks(settings.block_size) for scenario in scenarios) + 1
    longest = max(scenario.longest_tokens for scenario in scenarios)
    with tempfile.TemporaryDirectory() as folder:
        served = Served(
            model=MODEL,
            kind=kind,
            block_size=settings.block_size,
            sparsity=settings.sparsity,
            chunk_tokens=settings.chunk_tokens,
            max_model_len=-(-longest // 64) * 64 + 64,
            stock_blocks=stock_blocks // POOLS[pool],
        )
        with serve(served, Path(folder) / "server.log") as server:
            console.log(
                f"{kind}, {pool} pool: {served.blocks} blocks of {served.block_bytes} bytes"
            )
            results = []
            for scenario in scenarios:
                result = run_scenario(server, scenario)
                console.log(f"  {scenario.name}: {result.hit_tokens:,} of {result.prompt_tokens:,}")
                results.append(result)
            answers = [each for result in results for each in result.answers]
            answers = answers[settings.seed % settings.cold_every :: settings.cold_every]
            differ = cold.differing(server, answers)
            console.log(f"  answers that a cold cache does not give: {len(differ)}")
    return {
        "kind": kind,
        "pool": pool,
        "capacity": served.capacity(),
        "scenarios": [result.summary() for result in results],
        "prompt_tokens": sum(result.prompt_tokens for result in results),
        "hit_tokens": sum(result.hit_tokens for result in results),
        "compared_answers": len(answers),
        "differing_answers": differ,
    }


def compare(
    settings: Settings, kinds: Sequence[Kind], pools: Sequence[str], console: Console
) -> dict[str, Any]:
    """Run the asked-for parts; JSON-ready."""
    parts = []
    for kind in kinds:
        cold = ColdAnswers()
        for pool in pools:
            parts.append(run_part(settings, kind, pool, cold, console))
    return {"settings": asdict(settings), "provenance": provenance(), "parts": parts}


def report(result: dict[str, Any], console: Console) -> bool:
    """Print the table; whether the requirements hold for the parts that were run.

    A smoke run's hits are shown and not judged: of six users the one who comes second, and in whose
    run the common prefix is first seen to end, weighs as much as eight of fifty do. Its answers are.
    """
    found = {(part["kind"], part["pool"]): part for part in result["parts"]}
    settings, good = result["settings"], True
    table = Table(
        *("pool", "scenario", "prompt tokens", "stock hits", "duo hits", "duo / stock"),
        title=f"block size {settings['block_size']}, seed {settings['seed']}"
        + (", hits too few to be judged" if settings["smoke"] else ""),
    )
    for pool in POOLS:
        stock, duo = found.get(("stock", pool)), found.get(("duo", pool))
        if stock is None or duo is None:
            continue
        rows = [*zip(stock["scenarios"], duo["scenarios"], strict=True), (stock, duo)]
        for theirs, ours in rows:
            ratio = ours["hit_tokens"] / max(theirs["hit_tokens"], 1)
            name = theirs.get("name", "together")
            enough = ratio >= 0.9 and (pool == "full" or name != "together" or ratio > 1)
            good &= enough or settings["smoke"]
            cells = f"{theirs['hit_tokens']:,}", f"{ours['hit_tokens']:,}", f"{ratio:.3f}"
            table.add_row(pool, name, f"{theirs['prompt_tokens']:,}", *cells)
    console.print(table)
    capacity = Table(
        "server", "pool", "blocks", "MiB", "tokens held at once", "peak held", "differ"
    )
    for part in result["parts"]:
        figures = part["capacity"]
        peak = max(scenario["peak_held_share"] for scenario in part["scenarios"])
        good &= not part["differing_answers"]
        capacity.add_row(
            *(part["kind"], part["pool"], str(figures["blocks"])),
            f"{figures['pool_bytes'] / 2**20:.0f}",
            f"{figures['tokens_that_fit']:,}",
            f"{peak:.0%}",
            f"{len(part['differing_answers'])} of {part['compared_answers']}",
        )
    console.print(capacity)
    return good


def main() -> int:
    """Run the command; 1 if a requirement is missed or an answer differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="small, the full pool only")
    parser.add_argument("--block-size", type=positive_int, default=Settings.block_size)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--cold-every", type=positive_int, default=Settings.cold_every)
    parser.add_argument("--kind", choices=("stock", "duo"), help="one server kind only")
    parser.add_argument("--pool", choices=POOLS, help="one pool size only")
    parser.add_argument("--out", type=Path, help="JSON file to write; parts of equal settings stay")
    given = parser.parse_args()
    settings = Settings(block_size=given.block_size, seed=given.seed, cold_every=given.cold_every)
    pools = [given.pool] if given.pool else list(POOLS)
    if given.smoke:
        settings, pools = replace(settings, smoke=True), ["full"]
    # Ended by a time limit, it still stops its server.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(width=110)
    result = compare(settings, [given.kind] if given.kind else ["stock", "duo"], pools, console)
    if given.out is not None:
        merge(given.out, result)
    return 0 if report(result, console) else 1


def merge(path: Path, result: dict[str, Any]) -> None:
    """Put a result's parts into a file, beside those of equal settings; others are dropped."""
    if path.exists():
        before = json.loads(path.read_text())
        if before["settings"] == result["settings"]:
            new = {(part["kind"], part["pool"]) for part in result["parts"]}
            kept = [p for p in before["parts"] if (p["kind"], p["pool"]) not in new]
            result["parts"] = kept + result["parts"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    sys.exit(main())
