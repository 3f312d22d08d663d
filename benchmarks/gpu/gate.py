"""Whether a contender computes what it should, before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.gpu.baselines import Baseline
from benchmarks.gpu.cases import MODELS, Point, Shape
from benchmarks.gpu.layer import Attend, DuoStep, Layer
from benchmarks.gpu.retrieval_kernels import Kernel

WHOLE_BOUND = 0.01
"""Of two outputs' difference, by its size. Each rounds weights and results to bfloat16, by 2**-9 at
most; PyTorch's mathematics and the interpreted kernels differ by 0.005 at 700 tokens."""

SAMPLED_ROWS = 4
"""Query tokens that are held against float64 at a point, the first and the last among them."""


class GateError(RuntimeError):
    """A contender's result is wrong."""


def reference(
    layer: Layer, streaming: int, tokens: Sequence[int], dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Attention by the rule, as a mask over all keys.

    Args:
        layer: its tensors.
        streaming: KV heads that stream, the layer's first.
        tokens: query tokens of the step, in ascending order.
        dtype: of products and results; the softmax is float64, or float32 for a narrower type.

    Returns:
        [len(tokens), Hq, D] of ``dtype``.
    """
    point, shape = layer.point, layer.point.shape
    group = shape.num_heads // shape.num_kv_heads
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    found = []
    for request in range(point.requests):
        own = [token for token in tokens if token // point.chunk == request]
        if not own:
            continue
        chosen = torch.tensor(own, device=layer.device)
        position = point.before + chosen % point.chunk
        keys = torch.arange(point.context, device=layer.device)
        causal = keys <= position[:, None]
        recent = keys > position[:, None] - shape.recent_size
        kept = causal & ((keys < shape.sink_size) | recent)
        heads = []
        for head in range(shape.num_kv_heads):
            mask = kept if head < streaming else causal
            seen = mask.any(0).nonzero().flatten()
            blocks = layer.table[request, seen // shape.block_size].long()
            rows = layer.cache[blocks, head, seen % shape.block_size]
            k, v = (part.to(dtype) for part in rows.chunk(2, dim=-1))
            query = layer.query[chosen, head * group : (head + 1) * group].to(dtype)
            logits = (query @ k.T).to(inner) * shape.head_size**-0.5  # [n, group, keys]
            logits = logits.masked_fill(~mask[:, None, seen], -torch.inf)
            heads.append(logits.softmax(-1).to(dtype) @ v)
        found.append(torch.cat(heads, dim=1))
    return torch.cat(found)


def check_rows(
    name: str, output: torch.Tensor, layer: Layer, streaming: int, tokens: Sequence[int]
) -> float:
    """Hold query tokens of an output against float64.

    The error may be twice that of the same mathematics in bfloat16, and one rounding of the result.

    Args:
        name: of the contender.
        output: [T, Hq, D].
        layer: its tensors.
        streaming: KV heads that stream.
        tokens: which query tokens.

    Returns:
        The error, absolute.

    Raises:
        GateError: it is larger, or not a number.
    """
    exact = reference(layer, streaming, tokens)
    same = reference(layer, streaming, tokens, output.dtype).double()
    error = (output[list(tokens)].double() - exact).abs().max().item()
    bound = 2 * (same - exact).abs().max().item()
    bound += torch.finfo(output.dtype).eps * exact.abs().max().item()
    if not error <= bound:
        raise GateError(
            f"{name} is wrong at {describe(layer.point)}: expected an error of at most {bound:.3g} "
            f"against float64, got {error:.3g}"
        )
    return error


def check_whole(name: str, output: torch.Tensor, other: torch.Tensor, point: Point) -> float:
    """Hold a whole output with all heads retrieval heads against a baseline's.

    Returns:
        The difference's size by the baseline's.

    Raises:
        GateError: they differ by more than ``WHOLE_BOUND``.
    """
    difference = torch.linalg.vector_norm(output.float() - other.float())
    found = (difference / torch.linalg.vector_norm(other.float())).item()
    if not found <= WHOLE_BOUND:
        raise GateError(
            f"duo with all heads retrieval heads and {name} disagree at {describe(point)}: expected a "
            f"difference of at most {WHOLE_BOUND} of the result's size, got {found:.3g}"
        )
    return found


def check_writes(step: DuoStep, name: str) -> None:
    """Check that the rings hold the step's last tokens, bit for bit; the pages held theirs before.

    Raises:
        GateError: they do not.
    """
    layer, ring, cache = step.layer, step.caches.ring, step.caches.streaming
    if ring is None or cache is None:
        return
    point = layer.point
    first = max(point.before, point.context - ring.recent_size)
    positions = torch.arange(first, point.context)
    columns, offsets = (
        torch.from_numpy(part).to(layer.device) for part in ring.table_slots(positions.numpy())
    )
    for request, row in enumerate(ring.block_table):
        held = cache[row[columns].long(), :, offsets]
        own = layer.rows(request, positions.to(layer.device))[:, : step.streaming]
        if not torch.equal(held, own):
            raise GateError(
                f"{name} left other tokens in the ring of request {request}: {describe(point)}"
            )


def small_points(shapes: Sequence[Shape]) -> Iterator[Point]:
    """Points whose every output row is held against float64.

    Batches are of a size that is measured too, so that no kernel is compiled for the gate alone.
    """
    for shape in shapes:
        for before in (40, 319, 700):
            yield Point(shape=shape, context=before + 1, requests=4)
        for before in (0, 100, 700):
            yield Point(shape=shape, context=before + 300, chunk=300)


def check_small(
    device: torch.device,
    attend: Attend,
    baselines: Sequence[Baseline],
    shapes: Sequence[Shape] = tuple(MODELS.values()),
    points: Callable[[Sequence[Shape]], Iterator[Point]] = small_points,
    kernels: Sequence[Kernel] = (),
) -> tuple[list[Baseline], list[Kernel], dict[str, str]]:
    """Hold every contender against float64 on small cases.

    Args:
        device: where.
        attend: duo's step.
        baselines: those that are installed.
        shapes: layers.
        points: makes the cases.
        kernels: for the retrieval heads of prefills, besides Triton's.

    Returns:
        The baselines and kernels that are right, and why the others are left out.

    Raises:
        GateError: duo is wrong; nothing may be timed.
    """
    problems: dict[str, str] = {}
    for point in points(shapes):
        layer = Layer(point, device)
        tokens = range(point.num_tokens)
        for sparsity in point.sparsities:
            step = DuoStep(layer, point.streaming(sparsity), attend)
            name = contender(sparsity)
            check_rows(name, step(), layer, step.streaming, tokens)
            check_writes(step, name)
        for baseline in baselines:
            if baseline.name in problems:
                continue
            try:
                check_rows(baseline.name, baseline.prepare(layer)(), layer, 0, tokens)
            except Exception as error:  # whatever an implementation that does not fit raises
                problems[baseline.name] = f"{type(error).__name__}: {error}"
        for kernel in kernels if point.kind == "prefill" else ():
            try:
                for streaming in {*map(point.streaming, point.sparsities)} - {
                    point.shape.num_kv_heads
                }:
                    step = DuoStep(layer, streaming, attend, kernel)
                    check_rows(kernel.name, step(), layer, streaming, tokens)
            except Exception as error:
                problems.setdefault(kernel.name, f"{type(error).__name__}: {error}")
    return (
        [each for each in baselines if each.name not in problems],
        [each for each in kernels if each.name not in problems],
        problems,
    )


def sampled(point: Point) -> list[int]:
    """Query tokens over all of a step, the first and the last among them."""
    count = min(SAMPLED_ROWS, point.num_tokens)
    last = point.num_tokens - 1
    return sorted({round(index * last / max(count - 1, 1)) for index in range(count)})


def contender(sparsity: float, kernel: str = "") -> str:
    """Duo's name at a sparsity, and with another kernel for the prefills' retrieval heads."""
    return f"duo {sparsity:.0%}" + (f", {kernel}" if kernel else "")


def describe(point: Point) -> str:
    """A point for people."""
    step = "decode" if point.kind == "decode" else f"chunk of {point.chunk}"
    return f"{point.shape.name}, {step}, {point.requests} x {point.context} tokens"
