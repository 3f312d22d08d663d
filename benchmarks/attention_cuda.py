"""Attention kernels on an NVIDIA GPU against full attention, alternating in one run.

    python -m benchmarks.attention_cuda [--out FILE] [--smoke]

The baseline is FlashAttention as vLLM ships it, over a paged cache of all KV heads, or where there is
none PyTorch's scaled dot product attention over contiguous keys; the output names it. Every case is
replayed from a CUDA graph. The correctness gate runs first: no ratio is printed once it has failed. A
case that does not fit the GPU's memory is listed as skipped.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch.nn.attention.bias import causal_lower_right

from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches, PagedTable, RingTable
from vllm_duo.ops.layer import attend_and_write

BLOCK, RING_BLOCK, SINK, RECENT, HEAD = 16, 16, 64, 256, 128
SHAPES = {"Llama-3-8B": (32, 8), "Llama-2-7B": (32, 32)}
ROUNDS = 9


@dataclass(frozen=True)
class Case:
    """One measurement: ``requests`` chunks behind a context, in tokens."""

    model: str
    context: int
    chunk: int
    requests: int
    sparsity: float

    @property
    def streaming(self) -> int:
        """Streaming KV heads."""
        return round(self.sparsity * SHAPES[self.model][1])

    @property
    def needed_bytes(self) -> int:
        """Bytes of keys and values that the queries see, in bfloat16, each read once."""
        kept = min(self.context + self.chunk, SINK + RECENT + self.chunk - 1)
        retrieval = SHAPES[self.model][1] - self.streaming
        keys = retrieval * (self.context + self.chunk) + self.streaming * kept
        return self.requests * keys * 2 * HEAD * 2

    @property
    def cache_bytes(self) -> int:
        """Bytes of both implementations' caches."""
        full = self.requests * (self.context + self.chunk) * SHAPES[self.model][1] * 4 * HEAD
        return 2 * full


def cases(smoke: bool) -> Iterator[Case]:
    """Decodes of one token and prefill chunks of 2k and 8k tokens."""
    contexts = [1024, 4096] if smoke else [1024, 4096, 16384, 32768, 131072, 524288, 1048576]
    sparsities = [0.5] if smoke else [0.0, 0.25, 0.5, 0.75, 1.0]
    for model in SHAPES:
        for sparsity in sparsities:
            for context in contexts:
                for requests in [1] if smoke else [1, 4, 16, 64]:
                    yield Case(model, context - 1, 1, requests, sparsity)
                for chunk in [512] if smoke else [2048, 8192]:
                    if chunk <= context:
                        yield Case(model, context - chunk, chunk, 1, sparsity)


class Layer:
    """A case's tensors, and its step with either implementation."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        heads, kv_heads = SHAPES[case.model]
        tokens, total = case.requests * case.chunk, case.context + case.chunk

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16)

        def table(width: int) -> torch.Tensor:
            blocks = 1 + torch.arange(case.requests * width, dtype=torch.int32, device=device)
            return blocks.view(case.requests, width)

        self.q, self.k, self.v = (random(tokens, h, HEAD) for h in (heads, kv_heads, kv_heads))
        self.out, self.full_out = torch.empty_like(self.q), torch.empty_like(self.q)
        mask = np.arange(kv_heads) >= case.streaming
        self.heads = HeadMap.from_mask(mask, device)
        self.batch = Batch.from_host(
            np.arange(case.requests + 1) * case.chunk,
            np.full(case.requests, total),
            case.requests if case.chunk == 1 else 0,
            device,
        )
        width, ring_width = -(-total // BLOCK), (SINK + RECENT) // RING_BLOCK
        self.full = random(case.requests * width + 1, kv_heads, BLOCK, 2 * HEAD)
        self.table = table(width)
        # The retrieval cache of the gate must hold what the full cache holds.
        retrieval = self.full[:, case.streaming :].contiguous()
        ring = random(case.requests * ring_width + 1, case.streaming, RING_BLOCK, 2 * HEAD)
        ring_table = RingTable(table(ring_width), RING_BLOCK, SINK, RECENT, RECENT)
        self.caches = LayerCaches(
            retrieval if retrieval.numel() else None,
            PagedTable(self.table, BLOCK) if retrieval.numel() else None,
            ring if case.streaming else None,
            ring_table if case.streaming else None,
        )

    def duo(self) -> None:
        """Our whole step of the layer."""
        attend_and_write(
            self.q, self.k, self.v, self.heads, self.caches, self.batch, HEAD**-0.5, self.out
        )


def baseline(layer: Layer) -> tuple[str, Callable[[], None]]:
    """Name and step of full attention over all KV heads, of the chunk's tokens too."""
    case = layer.case
    total = case.context + case.chunk
    keys, values = layer.full.transpose(1, 2).chunk(2, dim=-1)  # [N, P, Hkv, D]
    positions = torch.arange(case.context, total, device=layer.q.device)
    blocks = layer.table[:, positions // BLOCK].long().flatten()
    offsets = (positions % BLOCK).repeat(case.requests)
    keys[blocks, offsets], values[blocks, offsets] = layer.k, layer.v
    try:
        from vllm_duo.attention.retrieval_prefill import find_flash_attn

        function, fa_version = find_flash_attn(HEAD)
    except ImportError:
        return "torch scaled_dot_product_attention", _dense(layer, keys, values)
    lens = layer.batch.seq_lens

    def run() -> None:
        layer.full_out = function(
            q=layer.q,
            k=keys,
            v=values,
            cu_seqlens_q=layer.batch.query_start_loc,
            max_seqlen_q=case.chunk,
            seqused_k=lens,
            max_seqlen_k=total,
            softmax_scale=HEAD**-0.5,
            causal=True,
            block_table=layer.table,
            fa_version=fa_version,
        )

    return f"FlashAttention {fa_version} of vLLM", run


def _dense(layer: Layer, keys: torch.Tensor, values: torch.Tensor) -> Callable[[], None]:
    """Attention over contiguous keys, as no serving engine has them: the most favourable case."""
    case = layer.case
    total = case.context + case.chunk
    shape = (case.requests, -1, layer.k.shape[1], HEAD)
    k, v = (t[layer.table.long()].reshape(shape)[:, :total].transpose(1, 2) for t in (keys, values))
    k, v = k.contiguous(), v.contiguous()
    q = layer.q.view(case.requests, case.chunk, -1, HEAD).transpose(1, 2)
    lower = causal_lower_right(case.chunk, total)
    mask = None if case.chunk == 1 else lower

    def run() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=True
        )
        layer.full_out = out.transpose(1, 2).reshape(layer.q.shape)

    return run


def check(device: torch.device) -> None:
    """The correctness gate: retrieval heads agree with the baseline's, in a decode and in a chunk.

    Raises:
        RuntimeError: they do not.
    """
    for model in SHAPES:
        for chunk in (1, 300):
            layer = Layer(Case(model, 700, chunk, 2, 0.5), device)
            name, full = baseline(layer)
            layer.duo()
            full()
            group = layer.q.shape[1] // layer.k.shape[1]
            first = layer.case.streaming * group
            error = (layer.out - layer.full_out)[:, first:].float().abs().max().item()
            if not error <= 8 * torch.finfo(torch.bfloat16).eps:
                raise RuntimeError(f"{model}, chunk {chunk}: duo and {name} differ by {error}")


def replayed(work: Callable[[], object]) -> Callable[[], float]:
    """Capture the work; each call replays it and returns its milliseconds on the device."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    start, end = (torch.Event(device="cuda", enable_timing=True) for _ in range(2))

    def run(repeats: int = 5) -> float:
        start.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / repeats

    run()
    return run


def limits(device: torch.device) -> dict[str, float]:
    """Copy bandwidth in GB/s (read and written) and bfloat16 multiplication in TFLOP/s."""
    data = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    other = torch.empty_like(data)
    copy = replayed(lambda: other.copy_(data))
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    multiply = replayed(lambda: torch.mm(a, b, out=c))
    return {
        "copy_gb_s": 2 * data.nbytes / min(copy() for _ in range(ROUNDS)) / 1e6,
        "gemm_tflop_s": 2 * 8192**3 / min(multiply() for _ in range(ROUNDS)) / 1e9,
    }


def measure(case: Case, device: torch.device, measured: dict[str, float]) -> dict[str, object]:
    """Medians and spreads of both, in turns."""
    layer = Layer(case, device)
    name, full = baseline(layer)
    works = (replayed(layer.duo), replayed(full))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for kept, work in zip(times, works, strict=True):
            kept.append(work())
    ours, theirs = (statistics.median(kept) for kept in times)
    bandwidth = case.needed_bytes / ours / 1e6
    return {
        **asdict(case),
        "baseline": name,
        "duo_ms": ours,
        "duo_spread_ms": [min(times[0]), max(times[0])],
        "stock_ms": theirs,
        "stock_spread_ms": [min(times[1]), max(times[1])],
        "speedup": theirs / ours,
        "duo_gb_s": bandwidth,
        "share_of_copy": bandwidth / measured["copy_gb_s"],
    }


def refusal() -> str | None:
    """Why nothing can be measured here, in one sentence; None where it can."""
    if torch.cuda.is_available() and torch.version.hip is None:
        return None
    return (
        "benchmarks.attention_cuda needs an NVIDIA GPU and a PyTorch built for CUDA, found "
        f"torch {torch.__version__} with {torch.cuda.device_count()} GPUs: nothing was measured"
    )


def versions() -> dict[str, str]:
    """Of what decides the result."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in ("torch", "triton", "vllm", "vllm-duo"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> int:
    """Measure and print; write JSON if asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a few short cases")
    arguments = parser.parse_args()
    console = Console()
    reason = refusal()
    if reason:
        console.print(reason, soft_wrap=True, highlight=False)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    check(device)
    measured = limits(device)
    result: dict[str, object] = {
        "device": torch.cuda.get_device_name(device),
        "versions": versions(),
        **measured,
    }
    rows: list[dict[str, object]] = []
    for case in cases(arguments.smoke):
        torch.cuda.empty_cache()
        if 1.2 * case.cache_bytes > torch.cuda.mem_get_info(device)[0]:
            rows.append({**asdict(case), "skipped": "does not fit the GPU's memory"})
        else:
            rows.append(measure(case, device, measured))
        console.print_json(data=rows[-1], indent=None)
    result["cases"] = rows
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
