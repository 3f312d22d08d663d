"""Requests that fit a KV pool at once, stock against duo, counted by vLLM's own scheduler.

All requests wait at the start; those that are resident with their whole prompt computed before the
first preemption count. No tensors: the model is faked (``simulated_engine.py``).

    python -m benchmarks.capacity --shape llama-3.1-8b --sparsity 0.5 --out capacity.json
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.arguments import positive_int, unit_share
from benchmarks.simulated_config import SHAPES, Kind
from benchmarks.simulated_engine import SimulatedEngine, make_engine
from vllm_duo.kv_cache.capacity import Capacity

SPARE_REQUESTS = 8
"""Requests queued beyond what should fit, so that the pool is what stops the scheduler."""

DEFAULT_CASES = (("llama-3.1-8b", 0.5), ("llama-2-7b", 0.75))
DEFAULT_BLOCK_SIZES = (16, 128)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison.

    Attributes:
        shape: the model, a key of ``SHAPES``.
        sparsity: share of the KV heads that stream.
        block_size: tokens of a block.
        tokens: prompt of each request, in tokens.
        max_tokens: tokens that each request generates once all have come in.
        stock_requests: requests for which stock's pool is made, with no block to spare.
        chunk_tokens: most tokens of a step; 0: every prompt in the first step.
        prefix_caching: whether finished blocks may be reused; all prompts differ.
        seed: of the prompts.
    """

    shape: str
    sparsity: float
    block_size: int
    tokens: int = 32_768
    max_tokens: int = 4
    stock_requests: int = 100
    chunk_tokens: int = 0
    prefix_caching: bool = False
    seed: int = 0

    @property
    def stock_block_bytes(self) -> int:
        """Bytes of a block of stock vLLM, all layers and heads, bf16."""
        shape = SHAPES[self.shape]
        token_bytes = 2 * shape.head_size * 2
        return shape.num_layers * shape.num_kv_heads * self.block_size * token_bytes

    @property
    def pool_bytes(self) -> int:
        """The pool of both: ``stock_requests`` prompts in stock's blocks, and its null block."""
        blocks = self.stock_requests * -(-self.tokens // self.block_size)
        return (blocks + 1) * self.stock_block_bytes

    @property
    def queued_requests(self) -> int:
        """Requests to queue: more than either engine can hold."""
        return round(self.stock_requests / (1 - self.sparsity)) + SPARE_REQUESTS

    @property
    def generated_tokens(self) -> int:
        """Tokens that each request generates: none may finish while others still come in."""
        if not self.chunk_tokens:
            return self.max_tokens
        return self.max_tokens + -(-self.queued_requests * self.tokens // self.chunk_tokens)


@dataclass(frozen=True, kw_only=True)
class Count:
    """What one engine held.

    Attributes:
        kind: duo or stock.
        resident: most requests with their whole prompt computed before the first preemption.
        planned: the same by block arithmetic, if none had generated a token.
        planned_grown: by block arithmetic, if each had generated all of its tokens.
        held_blocks: blocks in use at the time of ``resident``.
        blocks_per_request: of a request's prompt, by block arithmetic.
        block_bytes: bytes of a block.
        pool_blocks: blocks of the pool, the null block included.
        preemptions: over the whole run, until every request had finished.
        leaked_blocks: blocks still held then.
    """

    kind: Kind
    resident: int
    planned: int
    planned_grown: int
    held_blocks: int
    blocks_per_request: int
    block_bytes: int
    pool_blocks: int
    preemptions: int
    leaked_blocks: int

    @property
    def as_planned(self) -> bool:
        """Whether the scheduler held as many requests as the arithmetic says."""
        return self.planned_grown <= self.resident <= self.planned


def count(settings: Settings, kind: Kind) -> Count:
    """Fill a pool with one engine's requests, let all of them finish, and count."""
    most = settings.queued_requests
    grown = settings.tokens + settings.generated_tokens
    engine = make_engine(
        kind,
        settings.shape,
        sparsity=settings.sparsity,
        pool_bytes=settings.pool_bytes,
        block_size=settings.block_size,
        max_model_len=grown,
        max_num_seqs=most,
        max_num_batched_tokens=settings.chunk_tokens or most * settings.tokens,
        prefix_caching=settings.prefix_caching,
    )
    block_bytes = settings.stock_block_bytes if engine.layout is None else engine.layout.block_bytes
    random = Random(settings.seed)
    for index in range(most):
        engine.add(
            str(index), list(random.randbytes(settings.tokens)), max_tokens=grown - settings.tokens
        )
    all_blocks = engine.num_free_blocks
    resident = held_blocks = preemptions = 0
    while engine.scheduler.get_num_unfinished_requests():
        step = engine.step()
        if not step.scheduled:
            raise RuntimeError("no token was scheduled: the pool cannot hold a single request")
        preemptions += len(step.preempted)
        if not preemptions and engine.prefilled() > resident:
            resident, held_blocks = engine.prefilled(), all_blocks - engine.num_free_blocks
    return Count(
        kind=kind,
        resident=resident,
        planned=planned_requests(settings, engine, settings.tokens),
        planned_grown=planned_requests(settings, engine, grown),
        held_blocks=held_blocks,
        blocks_per_request=planned_blocks(settings, engine, settings.tokens),
        block_bytes=block_bytes,
        pool_blocks=engine.manager.block_pool.num_gpu_blocks,
        preemptions=preemptions,
        leaked_blocks=all_blocks - engine.num_free_blocks,
    )


def planned_blocks(settings: Settings, engine: SimulatedEngine, num_tokens: int) -> int:
    """Blocks of a request by block arithmetic: duo's layout, or stock's pages."""
    if engine.layout is not None:
        return engine.layout.blocks(num_tokens)
    return -(-num_tokens // settings.block_size)


def planned_requests(settings: Settings, engine: SimulatedEngine, num_tokens: int) -> int:
    """Requests of ``num_tokens`` that fit by the same arithmetic, the null block taken off."""
    if engine.layout is not None:
        return int(
            Capacity.of_bytes(engine.layout, settings.pool_bytes).concurrent_requests(num_tokens)
        )
    blocks = settings.pool_bytes // settings.stock_block_bytes - 1
    return blocks // planned_blocks(settings, engine, num_tokens)


def compare(settings: Settings) -> dict[str, Any]:
    """Count both; JSON-ready."""
    stock, duo = count(settings, "stock"), count(settings, "duo")
    return {
        "settings": asdict(settings) | {"pool_bytes": settings.pool_bytes},
        "stock": asdict(stock),
        "duo": asdict(duo),
        "ratio": duo.resident / stock.resident,
        "planned_ratio": duo.planned / stock.planned,
        "as_planned": stock.as_planned and duo.as_planned,
    }


def main() -> int:
    """Run the command; 1 if an engine held another number of requests than planned."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, help="default: both models, each as below")
    parser.add_argument(
        "--sparsity", type=unit_share, help="default: 0.5 of Llama-3.1, 0.75 of Llama-2"
    )
    parser.add_argument(
        "--block-size", type=positive_int, nargs="+", default=list(DEFAULT_BLOCK_SIZES)
    )
    for name in ("tokens", "max_tokens", "stock_requests", "chunk_tokens", "seed"):
        flag, default = "--" + name.replace("_", "-"), getattr(Settings, name)
        kind = int if name == "seed" else positive_int
        parser.add_argument(flag, type=kind, default=default, help=f"default: {default}")
    parser.add_argument("--prefix-caching", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    given = parser.parse_args()
    cases = [
        (shape, sparsity if given.sparsity is None else given.sparsity)
        for shape, sparsity in DEFAULT_CASES
        if given.shape in (None, shape)
    ]
    results = [
        compare(
            Settings(
                shape=shape,
                sparsity=sparsity,
                block_size=block_size,
                tokens=given.tokens,
                max_tokens=given.max_tokens,
                stock_requests=given.stock_requests,
                chunk_tokens=given.chunk_tokens,
                prefix_caching=given.prefix_caching,
                seed=given.seed,
            )
        )
        for shape, sparsity in cases
        for block_size in given.block_size
    ]
    report(results)
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(result["as_planned"] for result in results) else 1


def report(results: list[dict[str, Any]]) -> None:
    """Print one row a comparison."""
    table = Table(
        "model", "streaming", "block", "stock", "duo", "ratio", "planned: stock", "duo", "ratio"
    )
    for result in results:
        settings, stock, duo = result["settings"], result["stock"], result["duo"]
        table.add_row(
            settings["shape"],
            f"{settings['sparsity']:.0%}",
            str(settings["block_size"]),
            str(stock["resident"]),
            str(duo["resident"]),
            f"{result['ratio']:.3f}",
            str(stock["planned"]),
            str(duo["planned"]),
            f"{result['planned_ratio']:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    raise SystemExit(main())
