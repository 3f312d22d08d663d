"""Stock vLLM and duo under the same load: latency, throughput, KV use, right answers.

Both are servers of the same vLLM with the same flags. vLLM's own client, ``vllm bench serve``, sends
each of them the same seeded requests, one server at a time, round by round; first a gate checks that
duo's answers are right. ``docs/benchmarks.md`` tells all flags and what is written.

    python -m benchmarks.serve models/needle --sparsity 0.5 0.75 --lengths 1024 --out runs/needle
    python -m benchmarks.serve --resume runs/needle
    python -m benchmarks.serve --smoke --out runs/smoke
    vllm-duo report runs/needle --out report.html

Exit codes: 0; 1 if the gate is red, or a server or the client failed (what was measured is kept); 2 if
the input is at fault; 130 for Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.provenance import provenance
from benchmarks.serving.arguments import Command, parse
from benchmarks.serving.folder import RunFolder, refuse_other_settings
from benchmarks.serving.run import Benchmark
from benchmarks.serving.screen import Screen, tables
from benchmarks.serving.settings import Settings
from vllm_duo.report.serve_results import ServeResults

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None, vllm: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments; None: of this process.
        vllm: command in place of ``vllm``.
    """
    out, err = Console(), Console(stderr=True, highlight=False)
    folder: Path | None = None
    try:
        command = parse(sys.argv[1:] if argv is None else argv)
        folder = command.out or command.resume
        results = _run(command, err, vllm)
    except ValueError as error:
        err.print(f"Error: {error}", markup=False, soft_wrap=True)
        return BAD_INPUT
    except (RuntimeError, OSError) as error:
        err.print(f"Error: {error}", markup=False, soft_wrap=True)
        _tell_kept(err, folder)
        return FAILED
    except KeyboardInterrupt:
        _tell_kept(err, folder)
        return INTERRUPTED
    for table in tables(results):
        out.print(table)
    out.print(f"Saved to {folder}: vllm-duo report {folder} draws it", markup=False, soft_wrap=True)
    return 0


def _tell_kept(err: Console, folder: Path | None) -> None:
    """Unless there is nothing to go on with: the folder was not begun, or is free again."""
    if folder is None or not (folder / "settings.json").is_file():
        return
    err.print(
        f"What is finished is kept: go on with python -m benchmarks.serve --resume {folder}",
        markup=False,
        soft_wrap=True,
    )


def _run(command: Command, err: Console, vllm: Sequence[str] | None) -> ServeResults:
    settings, folder = _begin(command)
    try:
        with Screen(err, settings) as screen:
            benchmark = Benchmark(settings, folder, screen.tell, vllm)
            screen.expect(benchmark.tasks, folder.finished(settings))
            return benchmark.run(screen.start, screen.done)
    except ValueError:
        folder.discard()
        raise


def _begin(command: Command) -> tuple[Settings, RunFolder]:
    """A new run folder, or the one to go on with."""
    if command.resume is not None:
        folder = RunFolder(command.resume)
        settings = folder.settings()
        refuse_other_settings(settings, command.given, command.resume)
        folder.refuse_other_versions(provenance())
        return settings, folder
    assert command.out is not None, "the command line has one of the two"
    folder = RunFolder(command.out)
    prepare = command.preset.prepare if command.preset and "model" not in command.given else None
    model = command.out / "model"
    settings = command.settings(str(model) if prepare else None)
    folder.create(settings, provenance())
    if prepare is not None:
        try:
            prepare(model)
        except BaseException:  # a model that is not whole: nothing to go on with
            folder.discard()
            raise
    return settings, folder


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the servers, as Ctrl-C does
    raise SystemExit(main())
