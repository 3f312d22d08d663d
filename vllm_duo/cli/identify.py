"""``vllm-duo identify``: find a model's retrieval heads and write them as a head pattern."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vllm_duo.identify.methods import Progress
    from vllm_duo.identify.run import Outcome

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


class Method(StrEnum):
    """The identification methods."""

    GATES = "gates"
    RETRIEVAL_SCORE = "retrieval-score"
    INDUCTION = "induction"
    ON_THE_FLY = "on-the-fly"
    EXCLUSIVE = "exclusive"


def _option(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, show_default=False, **more)


@app.command()
def identify(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or Hugging Face name.")],
    out: Annotated[
        Path, _option("Folder to write: table, config.json, heatmap, REPORT.md.", "--out")
    ],
    method: Annotated[Method | None, _option("Default: gates.", "--method")] = None,
    source: Annotated[
        Path | None, _option("With --method exclusive: the pattern to start from.", "--from")
    ] = None,
    resume: Annotated[
        bool, _option("Go on where a run with the same settings was ended.", "--resume")
    ] = False,
    config: Annotated[
        Path | None, _option("JSON or TOML file of settings; options here win.", "--config")
    ] = None,
    seed: Annotated[int | None, _option("Of every choice. Default: 0.", "--seed")] = None,
    device: Annotated[str | None, _option("cpu, cuda, cuda:1 ...", "--device")] = None,
    dtype: Annotated[
        str | None, _option("float32, bfloat16 or float16. Default: bfloat16 on a GPU.", "--dtype")
    ] = None,
    sink_size: Annotated[
        int | None, _option("First tokens that streaming heads keep. Default: 64.", "--sink-size")
    ] = None,
    recent_size: Annotated[
        int | None, _option("Last tokens that they keep. Default: 256.", "--recent-size")
    ] = None,
    max_length: Annotated[
        int | None, _option("Tokens of the longest sample. Default: 2048.", "--max-length")
    ] = None,
    min_length: Annotated[
        int | None, _option("Tokens of the shortest sample.", "--min-length")
    ] = None,
    samples: Annotated[
        int | None, _option("Samples of the forward-only methods.", "--samples")
    ] = None,
    steps: Annotated[
        int | None, _option("Optimiser steps of gates. Default: 500.", "--steps")
    ] = None,
    batch_size: Annotated[
        int | None, _option("Samples a step of gates. Default: 1.", "--batch-size")
    ] = None,
    lr: Annotated[float | None, _option("Learning rate of gates. Default: 0.02.", "--lr")] = None,
    reg_weight: Annotated[
        float | None,
        _option("Weight of the gates' sum in the loss. Default: 0.05.", "--reg-weight"),
    ] = None,
    text: Annotated[
        Path | None, _option("Text file to hide the keys in. Default: made text.", "--text")
    ] = None,
    keys: Annotated[int | None, _option("Pass keys a sample. Default: 1.", "--keys")] = None,
    key_style: Annotated[
        str | None, _option("digits, or words of the tokenizer's vocabulary.", "--key-style")
    ] = None,
    key_length: Annotated[
        int | None, _option("Digits or words of a key. Default: 5.", "--key-length")
    ] = None,
    gqa: Annotated[
        str | None, _option("Query heads to KV head: max (default) or mean.", "--gqa")
    ] = None,
    needle_match: Annotated[
        str | None,
        _option("retrieval-score: exact (the paper's, default) or anywhere.", "--needle-match"),
    ] = None,
    induction_share: Annotated[
        float | None, _option("induction: default 0.14.", "--induction-share")
    ] = None,
    echo_share: Annotated[float | None, _option("induction: default 0.01.", "--echo-share")] = None,
    kernel: Annotated[
        str | None, _option("Streaming attention: sdpa (default) or flex.", "--kernel")
    ] = None,
    check_samples: Annotated[
        int | None, _option("Held-back samples of the self-check; 0: none.", "--check-samples")
    ] = None,
    check_length: Annotated[
        int | None, _option("Their tokens. Default: --max-length.", "--check-length")
    ] = None,
    check_sparsity: Annotated[
        float | None, _option("Sparsity that is judged. Default: 0.5.", "--check-sparsity")
    ] = None,
    checkpoint_every: Annotated[
        int | None, _option("Steps or samples between checkpoints.", "--checkpoint-every")
    ] = None,
    ray: Annotated[
        str | None, _option("Spread a forward-only method: local, or a cluster's address.", "--ray")
    ] = None,
) -> None:
    """Find a model's retrieval heads, check them, and write them as a head pattern."""
    flags = dict(locals())
    for name in ("model", "out", "resume", "config", "ray"):
        del flags[name]
    from transformers.utils import logging

    from vllm_duo.identify.run import identify as run
    from vllm_duo.identify.settings import make_settings

    logging.disable_progress_bar()  # of loading weights: it would break into ours
    settings = make_settings({**flags, "method": method.value if method else None}, config)
    with ProgressBar(settings.method) as progress:
        try:
            outcome = run(model, settings, out, resume=resume, ray=ray, progress=progress)
        except MemoryError as error:
            raise RuntimeError(str(error)) from None
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
    from vllm_duo.identify.checkpoint import CHECKPOINT_NAME

    if (folder / CHECKPOINT_NAME).exists():
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
