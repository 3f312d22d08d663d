"""The command line of ``benchmarks.serve``, as settings."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from benchmarks.serving.presets import PRESETS, Preset
from benchmarks.serving.settings import Point, Settings, Workload

WORKLOADS = get_args(Workload)
CROSSED = ("workloads", "lengths", "output_tokens", "requests", "rates", "concurrencies")
"""Flags that make up the points."""
DEFAULT_POINTS: dict[str, Any] = {
    "workloads": ["random"],
    "lengths": [1024],
    "output_tokens": 64,
    "requests": [32],
    "rates": [],
    "concurrencies": [1, 8],
}
PLAIN = {
    "model": "model",
    "pattern": "pattern",
    "sparsity": "sparsities",
    "rounds": "rounds",
    "seed": "seed",
    "passkey_share": "passkey_share",
    "documents": "documents",
    "dataset": "dataset",
    "enforce_eager": "enforce_eager",
    "servers": "servers",
    "port": "port",
    "gate_prompts": "gate_prompts",
    "gate_tie_nats": "gate_tie_nats",
    "point_timeout_s": "point_timeout_s",
}
"""Flags that are settings as they stand."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What was asked for.

    Attributes:
        given: settings that were given, by flags or a preset, and nothing else.
        out: folder of a new run; None with ``resume``.
        resume: folder of a run to go on with.
        preset: whose model is to be made; None without one.
    """

    given: dict[str, Any]
    out: Path | None
    resume: Path | None
    preset: Preset | None

    def settings(self, model: str | None = None) -> Settings:
        """The settings of a new run.

        Args:
            model: of a preset that makes it.

        Raises:
            ValueError: what is wrong with them, setting by setting.
        """
        values = dict(self.given)
        if model is not None:
            values.setdefault("model", model)
        if "model" not in values:
            raise ValueError("expected MODEL, a folder or a Hugging Face id, got none: name one")
        if "points" not in values:
            values["points"] = make_points({})
        try:
            return Settings(**values)
        except ValidationError as error:
            raise ValueError(told(error)) from None


def parse(argv: Sequence[str]) -> Command:
    """Read the command line.

    Raises:
        ValueError: flags that do not go together, or values that make no sense.
        SystemExit: argparse's own, for unknown flags and for --help.
    """
    flags = vars(_parser().parse_args(argv))
    out, resume, smoke = (flags.pop(name, None) for name in ("out", "resume", "smoke"))
    name = "smoke" if smoke else flags.pop("preset", None)
    if (out is None) == (resume is None):
        raise ValueError("expected --out DIR for a new run or --resume DIR, got both or none")
    preset = PRESETS[name]() if name else None
    given: dict[str, Any] = dict(preset.settings) if preset else {}
    crossed = {key: flags[key] for key in CROSSED if key in flags}
    if crossed:
        given["points"] = make_points(crossed)
    for flag, setting in PLAIN.items():
        if flag in flags:
            value = flags[flag]
            given[setting] = tuple(value) if isinstance(value, list) else value
    if "server_args" in flags:
        given["server_args"] = tuple(shlex.split(flags["server_args"]))
    if "env" in flags:
        given["env"] = {**given.get("env", {}), **dict(map(_variable, flags["env"]))}
    return Command(given=given, out=out, resume=resume, preset=preset)


def make_points(crossed: dict[str, Any]) -> tuple[Point, ...]:
    """Every workload at every length under every load.

    Raises:
        ValueError: impossible points, or as many --requests as there are neither lengths nor one.
    """
    flags = {**DEFAULT_POINTS, **crossed}
    if "rates" in crossed and "concurrencies" not in crossed:
        flags["concurrencies"] = []
    lengths, requests = flags["lengths"], flags["requests"]
    if len(requests) not in (1, len(lengths)):
        raise ValueError(
            f"--requests: expected one number, or one for each of the {len(lengths)} lengths, got "
            f"{len(requests)}"
        )
    counts = requests * len(lengths) if len(requests) == 1 else requests
    loads = [{"rate": rate} for rate in flags["rates"]]
    loads += [{"concurrency": number} for number in flags["concurrencies"]]
    points = []
    for workload in flags["workloads"]:
        sizes = zip(lengths, counts, strict=True) if workload != "dataset" else [(0, counts[0])]
        for tokens, count in sizes:
            for load in loads:
                if workload == "multi-turn" and "rate" in load:
                    continue  # a closed loop only, see workloads.py
                points.append(_point(workload, tokens, count, flags["output_tokens"], load))
    if not points:
        raise ValueError(
            "expected at least one point, got none: give --rates or --concurrencies (multi-turn is "
            "measured at concurrencies only)"
        )
    return tuple(points)


def _point(workload: str, tokens: int, count: int, output: int, load: dict[str, Any]) -> Point:
    try:
        return Point(
            workload=workload, prompt_tokens=tokens, output_tokens=output, requests=count, **load
        )
    except ValidationError as error:
        raise ValueError(told(error)) from None


def _variable(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ValueError(f"--env: expected NAME=VALUE, got {text!r}")
    return name, value


def told(error: ValidationError) -> str:
    """Pydantic's findings in one line each."""
    lines = []
    for found in error.errors():
        where = ".".join(str(part) for part in found["loc"])
        words = found["msg"].removeprefix("Value error, ")
        got = f", got {found['input']!r}" if where else ""
        lines.append(f"{where + ': ' if where else ''}{words}{got}")
    return "; ".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description="Stock vLLM and duo under the same load, measured by vLLM's own client.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder or Hugging Face id")
    add("--out", type=Path, metavar="DIR", help="folder of a new run")
    add("--resume", type=Path, metavar="DIR", help="go on with a run; its settings are kept there")
    add("--preset", choices=PRESETS, help="ready-made settings; other flags change them")
    add("--smoke", action="store_true", help="the same as --preset smoke")
    add("--pattern", metavar="P", help="head pattern; default: as the server finds it")
    add("--sparsity", type=float, nargs="+", metavar="X", help="a duo server each; default: 0.5")
    add("--workloads", nargs="+", choices=WORKLOADS, help="default: random")
    add("--lengths", type=int, nargs="+", metavar="N", help="prompt tokens; default: 1024")
    add("--output-tokens", type=int, metavar="N", help="default: 64")
    add("--requests", type=int, nargs="+", metavar="N", help="in all or per length; default: 32")
    add("--rates", type=float, nargs="+", metavar="R", help="open loop, requests/s; default: none")
    add(
        "--concurrencies",
        type=int,
        nargs="+",
        metavar="N",
        help="closed loop, requests in flight; default: 1 8, or none with --rates",
    )
    add("--documents", metavar="DIR", help="texts of the workload documents")
    add("--dataset", metavar="FILE", help="JSONL prompts of the workload dataset")
    add("--passkey-share", type=float, metavar="X", help="pass-key requests; default: 0.125")
    add("--rounds", type=int, metavar="N", help="default: 3")
    add("--seed", type=int, metavar="N", help="default: 0")
    add("--enforce-eager", action="store_true", help="no torch.compile and graphs on either side")
    add("--server-args", metavar="ARGS", help="of vllm serve for every side, in one string")
    add("--env", action="append", metavar="NAME=VALUE", help="of every server; may be repeated")
    add("--servers", choices=("auto", "resident", "in-turn"), help="whether all stay up")
    add("--port", type=int, metavar="N", help="of the first server; default: free ones")
    add("--gate-prompts", type=int, metavar="N", help="default: 4")
    add("--gate-tie-nats", type=float, metavar="X", help="nearly equal tokens; default: 0")
    add("--point-timeout-s", type=float, metavar="S", help="default: 1800")
    return parser
