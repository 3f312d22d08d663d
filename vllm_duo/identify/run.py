"""One identification run from a model's name to a pattern folder, resumable at any point."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from vllm_duo.heads import HeadPattern
from vllm_duo.heads.folder import TSV_NAME
from vllm_duo.identify import memory
from vllm_duo.identify.checkpoint import (
    Arrays,
    has_checkpoint,
    load_checkpoint,
    remove_checkpoint,
    run_fingerprint,
    save_checkpoint,
)
from vllm_duo.identify.exclusive import make_exclusive
from vllm_duo.identify.gates import GateState, gate_step, train_gates
from vllm_duo.identify.methods import Floats, ForwardMethod, Job, Progress, Scores, complete
from vllm_duo.identify.model import ModelInfo, load_model
from vllm_duo.identify.registry import FORWARD_METHODS
from vllm_duo.identify.results import Effort, check_can_draw, write_results
from vllm_duo.identify.samples import SampleMaker, to_batch
from vllm_duo.identify.self_check import CheckResult, check_pattern
from vllm_duo.identify.settings import IdentifySettings

# Settings that do not change the values: a run may be resumed with others.
_FREE_SETTINGS = {"check_samples", "check_length", "check_sparsity", "checkpoint_every"}
_SECONDS_KEY = "seconds"


@dataclass(frozen=True)
class Outcome:
    """What a run found and wrote."""

    pattern: HeadPattern
    check: CheckResult | None
    effort: Effort
    folder: Path


def identify(
    model_name: str,
    settings: IdentifySettings,
    out: Path,
    *,
    resume: bool = False,
    ray: str | None = None,
    progress: Progress = lambda done, total, note: None,
) -> Outcome:
    """Find a model's heads and write the pattern folder `out`.

    Args:
        model_name: folder or Hugging Face name of the model.
        settings: what to do.
        out: folder to write; made if needed.
        resume: go on where a run with the same settings was ended; from the start if it was ended
            before its first checkpoint.
        ray: spread a forward-only method over Ray: "local", or a cluster's address.
        progress: called as the run goes on.

    Raises:
        ValueError: bad settings or model, a finished pattern or another run's checkpoint in `out`.
        NotImplementedError: the model's attention cannot be hooked.
        MemoryError: names a length that fits.
        OSError: the disk is full or `out` cannot be written; the last checkpoint stays.
        RuntimeError: matplotlib is not installed.
    """
    check_folder(out, resume)
    check_can_draw()
    if ray is not None and settings.method not in FORWARD_METHODS:
        raise ValueError(
            f"--ray is for the methods that only run forward ({', '.join(FORWARD_METHODS)}), got "
            f"{settings.method}: leave it out"
        )
    model = load_model(model_name, device=settings.device, dtype=settings.dtype)
    job = Job(model, with_default_samples(complete(settings, model)))
    job.samples()  # a text that is too short is found here
    memory.check_fits(job, settings.min_length)
    run = run_fingerprint(run_facts(job))
    keeper = _Keeper(out, run, load_checkpoint(out, run) if resume else None)
    try:
        scores = _find_scores(job, keeper, ray, progress)
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
        error.__traceback__ = None  # its frames hold tensors
        raise memory.explain_out_of_memory(
            job, settings.min_length, lambda n: one_step(job, n)
        ) from None
    return _finish(job, scores, keeper, out, progress)


def _finish(job: Job, scores: Scores, keeper: _Keeper, out: Path, progress: Progress) -> Outcome:
    """Check the pattern, write it, and remove the checkpoint."""
    started = time.monotonic()
    check = None
    if job.settings.check_samples:
        place = f"in the self-check, with samples of {job.settings.check_length} tokens"
        remedy = "a shorter --check-length, or with --check-samples 0"
        with memory.explain_after_the_run(place, remedy, out):
            check = check_pattern(job, HeadPattern(scores.values), progress=progress)
    effort = Effort(
        units=count_units(job.settings),
        seconds=keeper.seconds(),
        check_seconds=time.monotonic() - started,
        peak_memory_bytes=memory.peak_bytes(job.model.device),
        threads=torch.get_num_threads(),
    )
    with memory.explain_after_the_run("as the results were written", "more memory free", out):
        pattern = write_results(out, job, scores, check, effort)
    remove_checkpoint(out)
    return Outcome(pattern, check, effort, out)


class _Keeper:
    """Saves a run's arrays with the seconds that they took, over all of its parts."""

    def __init__(self, folder: Path, run: str, saved: Arrays | None) -> None:
        self._folder, self._run = folder, run
        self._before = float(saved.pop(_SECONDS_KEY)) if saved else 0.0
        self._started = time.monotonic()
        self._stopped: float | None = None
        self.saved = saved

    def seconds(self) -> float:
        """Seconds of the run until `stop`, or until now."""
        return self._before + (self._stopped or time.monotonic()) - self._started

    def stop(self) -> None:
        """What comes from here on does not count."""
        self._stopped = time.monotonic()

    def save(self, arrays: Arrays) -> None:
        """Write a checkpoint."""
        save_checkpoint(self._folder, self._run, {**arrays, _SECONDS_KEY: np.array(self.seconds())})


def check_folder(out: Path, resume: bool) -> None:
    """Refuse to write over a finished pattern, or to start again beside a checkpoint.

    Raises:
        ValueError: `out` is a file, holds a finished pattern, or a checkpoint without `resume`.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: expected a folder, found a file: choose another name")
    unfinished = has_checkpoint(out)
    if unfinished and not resume:
        raise ValueError(
            f"--out {out}: expected an empty folder, found the checkpoint of an unfinished run: go "
            "on with --resume, remove it, or choose another folder"
        )
    if (out / TSV_NAME).exists() and not unfinished:
        raise ValueError(
            f"--out {out}: expected a folder without a pattern, found {TSV_NAME}: that run is "
            "finished; choose another folder or remove it"
        )


def run_facts(job: Job) -> dict[str, object]:
    """What makes two runs the same run."""
    settings = job.settings.model_dump(mode="json", exclude=_FREE_SETTINGS)
    if job.settings.text is not None:
        settings["text"] = hashlib.sha256(job.settings.text.read_bytes()).hexdigest()
    if job.settings.source is not None:
        values = HeadPattern.load(job.settings.source).values
        settings["source"] = hashlib.sha256(values.tobytes()).hexdigest()
    return {"model": job.model.info.fingerprint, "settings": settings}


def with_default_samples(settings: IdentifySettings) -> IdentifySettings:
    """Fill in the method's own number of samples."""
    method = FORWARD_METHODS.get(settings.method)
    if method is None or settings.samples is not None:
        return settings
    return settings.model_copy(update={"samples": method.default_samples})


def count_units(settings: IdentifySettings) -> int:
    """Steps or samples of a whole run."""
    if settings.method == "gates":
        return settings.steps
    return settings.samples or 1


def one_step(job: Job, length: int) -> None:
    """Compute one step whose samples have `length` tokens, and drop its result."""
    settings = job.settings.model_copy(update={"min_length": length, "max_length": length})
    trial = replace(job, settings=settings)
    if settings.method in FORWARD_METHODS:
        FORWARD_METHODS[settings.method].score(trial, 0)
        return
    maker: SampleMaker = trial.samples()
    ids, answers = to_batch([maker.make("identify", n) for n in range(settings.batch_size)])
    gate_step(trial, GateState.start(trial), ids, answers, trial.rule, 0)


def _find_scores(job: Job, keeper: _Keeper, ray: str | None, progress: Progress) -> Scores:
    method = job.settings.method
    if method == "gates":
        scores = train_gates(job, keeper.saved, keeper.save, progress)
    elif method in FORWARD_METHODS:
        scores = score_samples(
            job, FORWARD_METHODS[method], keeper.saved, keeper.save, progress, ray
        )
    else:
        assert job.settings.source is not None
        pattern = HeadPattern.load(job.settings.source)
        info = job.model.info
        pattern.validate_for(info.num_layers, info.num_kv_heads, info.name)
        scores = make_exclusive(pattern, info.chosen_layers)
    keeper.stop()
    return replace(scores, values=without_sliding(scores.values, job.model.info))


def without_sliding(values: Floats, info: ModelInfo) -> Floats:
    """The values, 0 in layers with a sliding window of the model's own: all of their heads stream."""
    chosen = np.zeros((info.num_layers, 1), dtype=bool)
    chosen[info.chosen_layers] = True
    return np.where(chosen, values, 0.0)


def score_samples(
    job: Job,
    method: ForwardMethod,
    saved: Arrays | None,
    save: Callable[[Arrays], None],
    progress: Progress,
    ray: str | None = None,
) -> Scores:
    """Score every sample, in this process or over Ray, and combine the scores in their order."""
    total = count_units(job.settings)
    found: list[Floats] = [] if saved is None else list(saved["scores"])
    for scores in _scores_from(job, method, len(found), total, ray):
        found.append(scores)
        if len(found) % job.settings.checkpoint_every == 0 or len(found) == total:
            save({"scores": np.stack(found)})
        progress(len(found), total, "samples scored")
    return method.combine(job, np.stack(found))


def _scores_from(
    job: Job, method: ForwardMethod, first: int, total: int, ray: str | None
) -> Iterator[Floats]:
    if ray is None:
        return (method.score(job, index) for index in range(first, total))
    from vllm_duo.identify.spread import score_over_ray

    return score_over_ray(job, range(first, total), ray)
