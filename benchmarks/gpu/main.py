"""A layer's attention on an NVIDIA GPU by this package's kernels and by full attention, in turns.

    python -m benchmarks.attention --device cuda [--smoke] [--out FILE.json] [--plot FILE.png]

A correctness gate comes first: small cases against float64, and at each point every contender on some
of its query tokens, and duo with all heads retrieval heads against full attention. No ratio is printed
of what has failed it. Every step is replayed from a raw CUDA graph, over as many layers as keep the
caches out of the L2 cache. Ratios are to the fastest full attention that is installed and right.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.arguments import positive_int, unit_share
from benchmarks.gpu import baselines, cases, gate, results, retrieval_kernels, timing
from benchmarks.gpu.cases import (
    CHUNKS,
    CONTEXTS,
    MODELS,
    REQUESTS,
    SMOKE,
    SPARSITIES,
    Limits,
    Point,
)
from benchmarks.gpu.layer import Attend, DuoStep, Layer


@dataclass(frozen=True)
class Machine:
    """What a point is measured with; tests have stand-ins for a GPU's.

    Attributes:
        device: where.
        attend: duo's step.
        baselines: that have passed the gate.
        kernels: for the retrieval heads of prefills, that have passed it too.
        limits: of the machine.
        cache_bytes: of the L2 cache.
        free_bytes: tells the device's free memory.
        capture: makes a graph of steps.
        rounds: at most.
    """

    device: torch.device
    attend: Attend
    baselines: Sequence[baselines.Baseline]
    limits: Limits
    cache_bytes: int
    free_bytes: Callable[[], int]
    capture: Callable[[Sequence[Callable[[], object]]], timing.Replay]
    kernels: Sequence[retrieval_kernels.Kernel] = ()
    rounds: int = timing.MOST_ROUNDS


def measure(point: Point, machine: Machine) -> results.Row:
    """Check and time every contender at a point.

    Returns:
        A row with ``contenders``; with ``skipped`` where the point does not fit the memory; with
        ``failed`` where duo has not passed the gate, and then without a time.
    """
    usable, kernels = list(machine.baselines), len(machine.kernels)
    copies = 1 + any(each.is_dense for each in usable)
    layers = timing.layers_in_turn(
        point, machine.cache_bytes, copies, machine.free_bytes(), kernels
    )
    if layers == 0 and any(not each.is_dense for each in usable):
        usable = [each for each in usable if not each.is_dense]
        layers = timing.layers_in_turn(point, machine.cache_bytes, 1, machine.free_bytes(), kernels)
    left_out = {
        each.name: "its copy of the cache does not fit beside the cache"
        for each in machine.baselines
        if each not in usable
    }
    need = timing.layer_bytes(point, 1 + any(each.is_dense for each in usable), kernels)
    if layers == 0:
        return _skipped(point, need, machine.free_bytes())
    try:
        return _measure(point, machine, usable, layers, left_out)
    except torch.cuda.OutOfMemoryError:
        return _skipped(point, need, machine.free_bytes())
    except gate.GateError as error:
        return {**results.point_row(point), "failed": str(error)}


def _skipped(point: Point, need: int, free: int) -> results.Row:
    sizes = f"{need / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free"
    return {**results.point_row(point), "skipped": f"does not fit the memory: needs {sizes}"}


def _measure(
    point: Point,
    machine: Machine,
    usable: Sequence[baselines.Baseline],
    layers: int,
    left_out: dict[str, str],
) -> results.Row:
    stack = [Layer(point, machine.device, seed) for seed in range(layers)]
    tokens = gate.sampled(point)
    steps: dict[str, list[Callable[[], torch.Tensor]]] = {}
    errors: dict[str, float] = {}
    whole = None
    for sparsity in point.sparsities:
        name, streaming = gate.contender(sparsity), point.streaming(sparsity)
        own = [DuoStep(layer, streaming, machine.attend) for layer in stack]
        errors[name] = gate.check_rows(name, own[0](), stack[0], streaming, tokens)
        gate.check_writes(own[0], name)
        if streaming == 0:
            whole = own[0].output
        steps[name] = list(own)
    if point.kind == "prefill":
        _add_kernels(point, machine, stack, steps, errors, left_out)
    differences = {}
    for baseline in usable:
        name = baseline.name
        try:
            runs = [baseline.prepare(layer) for layer in stack]
            output = runs[0]()
            errors[name] = gate.check_rows(name, output, stack[0], 0, tokens)
            if whole is not None:
                differences[name] = gate.check_whole(name, output, whole, point)
            steps[name] = runs
        except Exception as error:  # whatever an implementation that does not fit raises
            left_out[name] = f"{type(error).__name__}: {error}"
    if not any(baseline.name in steps for baseline in usable):
        raise gate.GateError(f"no full attention to compare with: {left_out}")
    replays = [machine.capture(own) for own in steps.values()]
    times = timing.take_turns(replays, machine.rounds)
    row = results.times_row(point, dict(zip(steps, times, strict=True)), layers, machine.limits)
    for name, error in errors.items():
        if name in row["contenders"]:
            row["contenders"][name]["error"] = error
    return {**row, "tokens_checked": tokens, "differences": differences, "left_out": left_out}


def _add_kernels(
    point: Point,
    machine: Machine,
    stack: Sequence[Layer],
    steps: dict[str, list[Callable[[], torch.Tensor]]],
    errors: dict[str, float],
    left_out: dict[str, str],
) -> None:
    """Duo with the other kernels for the retrieval heads; what is wrong or does not run is left out."""
    tokens = gate.sampled(point)
    for kernel in machine.kernels:
        for sparsity in point.sparsities:
            name, streaming = gate.contender(sparsity, kernel.name), point.streaming(sparsity)
            if streaming == point.shape.num_kv_heads:
                continue
            try:
                own = [DuoStep(layer, streaming, machine.attend, kernel) for layer in stack]
                errors[name] = gate.check_rows(name, own[0](), stack[0], streaming, tokens)
                gate.check_writes(own[0], name)
                steps[name] = list(own)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a kernel that does not fit raises
                left_out[name] = f"{type(error).__name__}: {error}"


def refusal() -> str | None:
    """Why nothing can be measured here, in one sentence; None where it can."""
    expected = (
        "expected a PyTorch built for CUDA, a GPU of compute capability 8.0 or later and Triton"
    )
    found = f"torch {torch.__version__} with {torch.cuda.device_count()} GPUs"
    remedy = "run it on a machine with such a GPU, or measure this processor with --device cpu"
    if torch.cuda.is_available() and torch.version.hip is None:
        capability = torch.cuda.get_device_capability()
        found = f"{torch.cuda.get_device_name()} of compute capability {capability}"
        if capability >= (8, 0):
            if find_spec("triton") is not None:
                return None
            found, remedy = f"no Triton beside torch {torch.__version__}", "pip install triton"
    return f"benchmarks.attention --device cuda: {expected}, got {found}: {remedy}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser("benchmarks.attention", description=__doc__.split("\n")[0])
    found.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    found.add_argument("--out", type=Path, help="JSON file, written again after each point")
    found.add_argument("--plot", type=Path, help="ratios over the context (.png, .svg or .pdf)")
    found.add_argument("--smoke", action="store_true", help="two contexts, few rounds")
    found.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    found.add_argument("--kinds", nargs="+", choices=["decode", "prefill"], default=None)
    found.add_argument(
        "--contexts", nargs="+", type=positive_int, help=f"tokens, default {CONTEXTS}"
    )
    found.add_argument(
        "--requests", nargs="+", type=positive_int, help=f"of decodes, default {REQUESTS}"
    )
    found.add_argument(
        "--chunks", nargs="+", type=positive_int, help=f"of prefills, default {CHUNKS}"
    )
    found.add_argument("--sparsities", nargs="+", type=unit_share, help=f"default {SPARSITIES}")
    found.add_argument(
        "--max-seconds",
        type=float,
        default=float("inf"),
        help="begin no point after so long; the rest is listed as skipped",
    )
    return found


def points(arguments: argparse.Namespace) -> list[Point]:
    """The points that the command line asks for."""
    chosen = dict(SMOKE) if arguments.smoke else {}
    for name in ("contexts", "requests", "chunks", "sparsities", "kinds"):
        if getattr(arguments, name) is not None:
            chosen[name] = tuple(getattr(arguments, name))
    return list(cases.points(models=tuple(arguments.models), **chosen))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write JSON and a plot if asked for.

    Returns:
        0; 1 if a gate has failed; 2 where nothing can be measured.
    """
    arguments = parser().parse_args(argv)
    console = Console()
    console.width = max(console.width, 150)
    reason = refusal()
    if reason:
        console.print(reason, soft_wrap=True, highlight=False)
        return 2
    if find_spec("vllm_duo._cpu") is None:
        # A folder of sources: no tensor on the CPU is computed with.
        os.environ.setdefault("VLLM_DUO_OPS", "reference")
    from vllm_duo.ops.layer.triton import attend_and_write

    device = torch.device("cuda", torch.cuda.current_device())
    found, missing = [], {}
    for each in baselines.installed(device):
        if isinstance(each, baselines.Baseline):
            found.append(each)
        else:
            missing[each[0]] = each[1]
    try:
        right, kernels, wrong = gate.check_small(
            device, attend_and_write, found, kernels=list(retrieval_kernels.installed())
        )
        if not right:
            raise gate.GateError(f"no full attention is installed and right: {missing | wrong}")
    except gate.GateError as error:
        console.print(f"the correctness gate failed, nothing was timed: {error}", soft_wrap=True)
        return 1
    limits = timing.measure_limits(device)
    machine = Machine(
        device,
        attend_and_write,
        right,
        limits,
        torch.cuda.get_device_properties(device).L2_cache_size,
        lambda: torch.cuda.mem_get_info(device)[0],
        timing.captured,
        kernels,
        5 if arguments.smoke else timing.MOST_ROUNDS,
    )
    result = {
        **results.provenance(device),
        "limits": vars(limits),
        "baselines": [each.name for each in right],
        "retrieval_prefill": ["triton", *(each.name for each in kernels)],
        "not_compared": missing | wrong,
    }
    console.print_json(data=result)
    rows = run(points(arguments), machine, arguments, result, console)
    return 1 if any("failed" in row for row in rows) else 0


def run(
    every: Sequence[Point],
    machine: Machine,
    arguments: argparse.Namespace,
    result: dict[str, object],
    console: Console,
) -> list[results.Row]:
    """Measure all points; after each, write what is known by then.

    Args:
        every: the points, in order.
        machine: what they are measured with.
        arguments: ``out``, ``plot`` and ``max_seconds`` are read.
        result: the JSON file's other entries, mutated.
        console: for the table.
    """
    begin = time.monotonic()
    rows: list[results.Row] = []
    result["points"] = rows
    for number, point in enumerate(every, 1):
        if time.monotonic() - begin > arguments.max_seconds:
            reason = f"after {arguments.max_seconds:g} s (--max-seconds)"
            rows.append({**results.point_row(point), "skipped": reason})
        else:
            rows.append(measure(point, machine))
            console.print(f"{number}/{len(every)} {gate.describe(point)}", highlight=False)
            if machine.device.type == "cuda":
                torch.cuda.empty_cache()
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(results.table_of(rows))
    if arguments.plot and any("contenders" in row for row in rows):
        title = f"{result.get('device')}; full attention: {', '.join(result['baselines'])}"
        results.plot(rows, arguments.plot, title)
    return rows
