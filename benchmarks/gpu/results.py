"""What is said of the times: rows for JSON, a table for people, a plot."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.gpu.cases import Limits, Point
from benchmarks.gpu.gate import contender
from benchmarks.gpu.timing import spread

Row = dict[str, Any]


def point_row(point: Point) -> Row:
    """A point for JSON."""
    return {
        "model": point.shape.name,
        "kind": point.kind,
        "context": point.context,
        "chunk": point.chunk,
        "requests": point.requests,
        "shape": asdict(point.shape),
    }


def times_row(
    point: Point, times: Mapping[str, Sequence[float]], layers: int, limits: Limits
) -> Row:
    """What each contender took of one layer's step, and how near to the machine's limits that is.

    Args:
        point: what was measured.
        times: milliseconds of ``layers`` layers by contender; duo's have their sparsity's name.
        layers: that took turns in a graph.
        limits: of the machine.

    Returns:
        One entry a contender, each with its ratio to the fastest full attention.
    """
    works = {
        name: point.work(point.streaming(s))
        for s in point.sparsities
        for name in times
        if name == contender(s) or name.startswith(f"{contender(s)}, ")
    }
    full = point.work(0, writes=False)
    contenders: dict[str, Row] = {}
    for name, taken in times.items():
        work = works.get(name, full)
        row: Row = spread([each / layers for each in taken])
        least, limit = limits.least_ms(work)
        seconds = row["median_ms"] / 1e3
        contenders[name] = {
            **row,
            "bytes": work.num_bytes,
            "flop": work.flop,
            "gb_s": work.num_bytes / seconds / 1e9,
            "tflop_s": work.flop / seconds / 1e12,
            "limit": limit,
            "share_of_limit": least / row["median_ms"],
        }
    baselines = [name for name in times if name not in works]
    best = min(baselines, key=lambda name: contenders[name]["median_ms"])
    for row in contenders.values():
        row["times_best"] = contenders[best]["median_ms"] / row["median_ms"]
    return {**point_row(point), "layers": layers, "baseline": best, "contenders": contenders}


def table_of(rows: Sequence[Row]) -> Table:
    """For people: one line a contender."""
    table = Table("model", "step", "requests x tokens", "kernels")
    for column in ("median ms (p25-p75)", "MB", "GB/s", "TFLOP/s", "of limit", "x best full"):
        table.add_column(column, justify="right")
    for row in rows:
        step = "decode" if row["kind"] == "decode" else f"chunk {row['chunk']}"
        head = (row["model"], step, f"{row['requests']} x {row['context']}")
        if "contenders" not in row:
            table.add_row(*head, row.get("skipped") or row["failed"])
            continue
        for name, each in row["contenders"].items():
            mark = " (best full)" if name == row["baseline"] else ""
            table.add_row(
                *head,
                name + mark,
                f"{each['median_ms']:.4g} ({each['p25_ms']:.4g}-{each['p75_ms']:.4g})",
                f"{each['bytes'] / 1e6:.4g}",
                f"{each['gb_s']:.0f}",
                f"{each['tflop_s']:.1f}",
                f"{each['share_of_limit']:.0%} {each['limit']}",
                f"{each['times_best']:.2f}",
            )
        for name, problem in row.get("left_out", {}).items():
            table.add_row(*head, f"{name}: {problem}")
    return table


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw duo's ratio to the fastest full attention over the context, one panel a kind of step.

    Args:
        rows: of ``times_row``; skipped points are left out.
        path: .png, .svg or .pdf.
        title: names device and baselines.

    Raises:
        ValueError: no point was measured.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    measured = [row for row in rows if "contenders" in row]
    if not measured:
        raise ValueError("nothing to plot: no point was measured")
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in measured:
        step = f"chunk of {row['chunk']:,}" if row["kind"] == "prefill" else "decode"
        panels.setdefault((row["model"], f"{step}, {row['requests']} requests"), []).append(row)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4 * columns, 3 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, ((model, step), own) in zip(axes.flat, sorted(panels.items()), strict=False):
        names = [name for name in own[0]["contenders"] if name.startswith("duo ")]
        for name in names:
            drawn = [row for row in own if name in row["contenders"]]
            ratios = [row["contenders"][name]["times_best"] for row in drawn]
            axis.plot([row["context"] for row in drawn], ratios, marker="o", label=name)
        axis.axhline(1, color="0.6", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_title(f"{model}\n{step}", fontsize="small")
        axis.set_xlabel("context, tokens")
        axis.set_ylabel("speed, x best full attention")
        axis.set_ylim(bottom=0)
    axes.flat[0].legend(fontsize="x-small")
    figure.suptitle(title, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def provenance(device: torch.device) -> Row:
    """Versions, device and command of a run."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "command": "python -m benchmarks.attention " + " ".join(sys.argv[1:]),
        "commit": _told(["git", "rev-parse", "--short", "HEAD"], Path(__file__).parent),
        "python": sys.version.split()[0],
        "cuda": str(torch.version.cuda),
        "cudnn": torch.backends.cudnn.version(),
        **{name: _version(name) for name in PACKAGES},
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "nvidia_smi": _told(
            [
                "nvidia-smi",
                "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit",
                "--format=csv,noheader",
            ]
        ),
    }


PACKAGES = ("torch", "triton", "vllm", "flashinfer-python", "vllm-duo")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _told(command: list[str], folder: Path | None = None) -> str:
    try:
        told = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return told.stdout.strip() or "unknown"
