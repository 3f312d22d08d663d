"""How well each identification method finds the heads of small trained models.

    python -m benchmarks.identification --models models/needle --out results.json

Every method runs with every seed; each pattern is measured on held-back pass-key samples, whose key
lies outside of what streaming heads keep, at several sparsities. Models are folders; others than the
needle model are trained by `python -m models.train_needle` with other shapes. `--append` adds to what
is in the file and skips what is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.arguments import positive_int
from benchmarks.provenance import provenance
from vllm_duo.heads import HeadPattern
from vllm_duo.identify.haystack import MadeText
from vllm_duo.identify.methods import Job, complete
from vllm_duo.identify.model import HookedModel, load_model
from vllm_duo.identify.policies import ClassPolicy, full_policy
from vllm_duo.identify.run import identify
from vllm_duo.identify.samples import Sample, SampleMaker
from vllm_duo.identify.self_check import accuracy
from vllm_duo.identify.settings import IdentifySettings

console, errors = Console(), Console(stderr=True)
SINK, RECENT = 16, 64
SPARSITIES = (0.25, 0.5, 0.75)
METHODS: dict[str, dict[str, Any]] = {
    "gates": {"method": "gates"},
    "retrieval-score": {"method": "retrieval-score"},
    "retrieval-score, anywhere": {"method": "retrieval-score", "needle_match": "anywhere"},
    "induction": {"method": "induction"},
    "on-the-fly": {"method": "on-the-fly"},
    "exclusive from gates": {"method": "exclusive"},
}


def main(arguments: list[str]) -> None:
    """Run what the command line names and print the table."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    done: list[dict[str, Any]] = []
    if options.append and options.out.exists():
        done = json.loads(options.out.read_text())["runs"]
    known = {(run["model"], run["method"], run["seed"]) for run in done}
    for folder in options.models:
        for seed in options.seeds:
            done += measure_model(folder, seed, options, known)
            record = {"settings": vars(options), "provenance": provenance(), "runs": done}
            options.out.write_text(json.dumps(record, indent=1, default=str) + "\n")
    console.print(table(done), markup=False, highlight=False, soft_wrap=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.identification", description=__doc__
    )
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--max-length", type=positive_int, default=512, help="of the samples learned from"
    )
    parser.add_argument("--steps", type=positive_int, default=200, help="of gates")
    parser.add_argument("--samples", type=positive_int, default=20, help="held-back samples a seed")
    parser.add_argument(
        "--length", type=positive_int, default=1024, help="of the held-back samples"
    )
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if "exclusive from gates" in options.methods and "gates" not in options.methods:
        parser.error("exclusive from gates needs gates among --methods")
    return options


def measure_model(
    folder: Path, seed: int, options: argparse.Namespace, known: set[tuple[str, str, int]]
) -> list[dict[str, Any]]:
    """Every method with one seed on one model; the same held-back samples for all of them."""
    wanted = [m for m in options.methods if (folder.name, m, seed) not in known]
    if not wanted:
        return []
    model = load_model(str(folder), device="cpu", dtype=None)
    maker = SampleMaker(model.tokenizer, MadeText(), seed, (options.length, options.length))
    samples = maker.make_hidden("check", options.samples, SINK, RECENT)
    info = model.info
    none = ClassPolicy(
        torch.zeros(info.num_layers, info.num_kv_heads, dtype=torch.bool), rule(model)
    )
    shared = {
        "model": folder.name,
        "seed": seed,
        "samples": len(samples),
        "full": accuracy(model, samples, full_policy),
        "streaming": accuracy(model, samples, none),
    }
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in wanted:
            runs.append(
                shared | measure_method(folder, name, seed, options, model, samples, Path(scratch))
            )
            errors.print(json.dumps(runs[-1]), markup=False, highlight=False, soft_wrap=True)
    return runs


def rule(model: HookedModel) -> Any:
    """What streaming heads keep."""
    return Job(model, complete(IdentifySettings(sink_size=SINK, recent_size=RECENT), model)).rule


def measure_method(
    folder: Path,
    name: str,
    seed: int,
    options: argparse.Namespace,
    model: HookedModel,
    samples: list[Sample],
    scratch: Path,
) -> dict[str, Any]:
    """One method with one seed: its pattern's accuracy by sparsity, and the seconds it took."""
    settings = {
        **METHODS[name],
        "seed": seed,
        "sink_size": SINK,
        "recent_size": RECENT,
        "max_length": options.max_length,
        "steps": options.steps,
        "check_samples": 0,
    }
    if name.startswith("exclusive"):
        settings["source"] = scratch / "gates"
    started = time.monotonic()
    outcome = identify(str(folder), IdentifySettings(**settings), scratch / name)
    seconds = time.monotonic() - started
    found = {}
    for sparsity in SPARSITIES:
        mask = torch.from_numpy(outcome.pattern.select(sparsity=sparsity).retrieval.copy())
        found[f"{sparsity:g}"] = accuracy(model, samples, ClassPolicy(mask, rule(model)))
    return {
        "method": name,
        "accuracy": found,
        "seconds": round(seconds, 1),
        "values": HeadPattern(outcome.pattern.values).values.round(4).tolist(),
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Mean accuracy over the seeds, lowest and highest in brackets, per model and method."""
    lines = []
    by_model: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        by_model[run["model"]][run["method"]].append(run)
    for model, methods in by_model.items():
        first = [run for runs in methods.values() for run in runs]
        full, none = (spread([run[key] for run in first]) for key in ("full", "streaming"))
        lines += [
            f"**{model}** (all heads keep everything: {full}; every head streams: {none})",
            "",
            "| method | 25 % stream | 50 % | 75 % | seconds |",
            "|---|---|---|---|---|",
        ]
        for method, runs_of_it in methods.items():
            cells = [
                spread([run["accuracy"][f"{sparsity:g}"] for run in runs_of_it])
                for sparsity in SPARSITIES
            ]
            seconds = [run["seconds"] for run in runs_of_it]
            cells.append(
                f"{statistics.median(seconds):.0f} ({min(seconds):.0f}-{max(seconds):.0f})"
            )
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def spread(shares: list[float]) -> str:
    """Mean and range in per cent."""
    mean, low, high = (100 * f(shares) for f in (statistics.mean, min, max))
    return f"{mean:.0f}" if low == high else f"{mean:.0f} ({low:.0f}-{high:.0f})"


if __name__ == "__main__":
    main(sys.argv[1:])
