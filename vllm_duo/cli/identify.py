"""``vllm-duo identify``: find a model's retrieval heads and write them as a head pattern."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_duo.cli.identify_options import (
    CheckOptions,
    GateOptions,
    MethodOptions,
    ModelOptions,
    RunOptions,
    SampleOptions,
    ScoreOptions,
    StreamingOptions,
)
from vllm_duo.cli.option_groups import grouped, option

if TYPE_CHECKING:
    from vllm_duo.identify.methods import Progress
    from vllm_duo.identify.run import Outcome

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.command()
@grouped
def identify(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or Hugging Face name.")],
    out: Annotated[
        Path, option("Folder to write: table, config.json, heatmap, REPORT.md.", "--out")
    ],
    method: MethodOptions,
    run: RunOptions,
    numbers: ModelOptions,
    streaming: StreamingOptions,
    samples: SampleOptions,
    gates: GateOptions,
    scores: ScoreOptions,
    check: CheckOptions,
) -> None:
    """Find a model's retrieval heads, check them, and write them as a head pattern."""
    from transformers.utils import logging

    from vllm_duo.identify.run import identify as find
    from vllm_duo.identify.settings import make_settings

    logging.disable_progress_bar()  # of loading weights: it would break into ours
    given: dict[str, Any] = {"checkpoint_every": run.checkpoint_every}
    for group in (method, numbers, streaming, samples, gates, scores, check):
        given |= asdict(group)
    given["method"] = method.method.value if method.method else None
    settings = make_settings(given, run.config)
    with ProgressBar(settings.method) as progress:
        try:
            outcome = find(model, settings, out, resume=run.resume, ray=run.ray, progress=progress)
        except KeyboardInterrupt:
            _tell_interrupted(out)
            raise typer.Exit(130) from None
    _tell(outcome)


class ProgressBar:
    """A bar with the time left, on the error stream."""

    def __init__(self, method: str) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        from vllm_duo.cli.consoles import err

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=err,
        )
        self._method = method

    def __enter__(self) -> Progress:
        self._bar.start()
        tasks: dict[str, Any] = {}

        def progress(done: int, total: int, note: str) -> None:
            name = "self-check" if note.startswith("self-check") else self._method
            if name not in tasks:
                tasks[name] = self._bar.add_task(name, total=total, note=note)
            self._bar.update(tasks[name], completed=done, total=total, note=note)

        return progress

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def _tell_interrupted(folder: Path) -> None:
    from vllm_duo.cli.consoles import err
    from vllm_duo.identify.checkpoint import has_checkpoint

    if has_checkpoint(folder):
        err.print(f"ended; {folder} holds a checkpoint: go on with --resume", highlight=False)
    else:
        err.print("ended before the first checkpoint", highlight=False)


def _tell(outcome: Outcome) -> None:
    from vllm_duo.cli.consoles import out

    effort = outcome.effort
    out.print(
        f"{outcome.folder}: {effort.units} steps or samples in {effort.seconds:.1f} s, "
        f"{effort.seconds_per_unit:.3g} s each, peak memory {effort.peak_memory_bytes / 2**20:.0f} MiB",
        highlight=False,
        soft_wrap=True,
    )
    if outcome.check is None:
        out.print("not checked (--check-samples 0)", highlight=False)
        return
    check = outcome.check
    out.print(
        f"at sparsity {check.sparsity:g}: {check.verdict}: {check.reason} (REPORT.md)",
        highlight=False,
        soft_wrap=True,
    )
