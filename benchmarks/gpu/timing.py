"""Times on a GPU: raw CUDA graphs, replayed in turns, and the limits of the same machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.gpu.cases import Limits, Point

SLICE_MS, TOTAL_MS = 5.0, 400.0
"""A contender's turn is at least so long, and all its turns together about so long."""

MOST_ROUNDS, FEWEST_ROUNDS = 25, 5

LAYERS = 32
"""Layers that take turns at most."""

Replay = Callable[[int], float]
"""Runs a graph so many times and returns the mean milliseconds of one."""


def captured(steps: Sequence[Callable[[], object]]) -> Replay:
    """Capture steps in one raw CUDA graph, after three runs without one.

    Args:
        steps: of the layers, one after another.
    """
    for _ in range(3):
        for step in steps:
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay(repeats: int) -> float:
        start.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / repeats

    return replay


def take_turns(replays: Sequence[Replay], most_rounds: int = MOST_ROUNDS) -> list[list[float]]:
    """Milliseconds of each in every round, in turns, after a first one that sets the repeats.

    Args:
        replays: of the contenders.
        most_rounds: rounds at most; long steps get fewer.
    """
    repeats = [max(1, math.ceil(SLICE_MS / max(replay(1), 1e-3))) for replay in replays]
    firsts = [replay(count) * count for replay, count in zip(replays, repeats, strict=True)]
    rounds = min(most_rounds, max(FEWEST_ROUNDS, int(TOTAL_MS / max(firsts))))
    times: list[list[float]] = [[] for _ in replays]
    for _ in range(rounds):
        for kept, replay, count in zip(times, replays, repeats, strict=True):
            kept.append(replay(count))
    return times


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes of times in milliseconds."""
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
    return {
        "median_ms": float(median),
        "p25_ms": float(low),
        "p75_ms": float(high),
        "min_ms": min(times),
        "max_ms": max(times),
        "rounds": len(times),
    }


def measure_limits(device: torch.device) -> Limits:
    """The best copy and the best matrix product of several, from graphs as the rest."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    copy = captured([lambda: target.copy_(source)])
    multiply = captured([lambda: torch.mm(a, b, out=product)])
    copying, multiplying = take_turns([copy, multiply])
    return Limits(
        copy_gb_s=2 * source.nbytes / min(copying) / 1e6,
        gemm_tflop_s=2 * 8192**3 / min(multiplying) / 1e9,
    )


def layers_in_turn(
    point: Point, cache_bytes: int, copies: int, free_bytes: int, kernels: int = 0
) -> int:
    """Layers that take turns in a graph, so that their caches come from memory; 0: not one fits.

    Worked example: Llama-3-8B, one decode at 1,024 tokens. 75 % streaming reads and writes 2.05 MB, and
    three times an L2 of 60 MiB are 92 of them: 32 layers, as many as the model has.

    Args:
        point: what is measured.
        cache_bytes: of the device's L2 cache.
        copies: of the whole cache that the contenders need, 1 or 2.
        free_bytes: of the device's memory.
        kernels: as in ``layer_bytes``.
    """
    least = min(point.work(point.streaming(share)).num_bytes for share in point.sparsities)
    wanted = min(LAYERS, max(1, math.ceil(3 * cache_bytes / least)))
    return min(wanted, int(0.9 * free_bytes) // layer_bytes(point, copies, kernels))


def layer_bytes(point: Point, copies: int, kernels: int = 0) -> int:
    """Bytes of a layer's tensors: caches, rings, queries, and every contender's output.

    Args:
        point: what is measured.
        copies: of the whole cache.
        kernels: that serve the retrieval heads of prefills, besides Triton's.
    """
    shape = point.shape
    contenders = len(point.sparsities) * (1 + (kernels if point.kind == "prefill" else 0))
    slots = shape.sink_size + shape.recent_size + shape.block_size
    rings = sum(map(point.streaming, point.sparsities)) / shape.num_kv_heads
    rings *= contenders / len(point.sparsities)
    ring_bytes = int(rings * point.requests * slots * shape.token_bytes)
    step_bytes = point.num_tokens * (
        2 * shape.token_bytes + (contenders + 5) * 2 * shape.num_heads * shape.head_size
    )
    return copies * point.cache_bytes + ring_bytes + step_bytes
