"""Writes what a run found: the pattern folder, its heatmap and REPORT.md."""

from __future__ import annotations

import io
import json
import platform
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vllm_duo.heads import HeadPattern
from vllm_duo.heads.folder import CONFIG_NAME, TSV_NAME
from vllm_duo.heads.picture import draw_png
from vllm_duo.identify.checkpoint import explain_full_disk, has_checkpoint, write_atomically
from vllm_duo.identify.exclusive import exclusive_sparsities
from vllm_duo.identify.methods import Floats, Job, Scores
from vllm_duo.identify.registry import DESCRIPTIONS
from vllm_duo.identify.self_check import CheckResult, percent, wilson_interval
from vllm_duo.versions import installed
from vllm_duo.windows import describe

REPORT_NAME = "REPORT.md"
HEATMAP_NAME = "heatmap.png"
COMMON_SPARSITIES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Effort:
    """What a run took.

    Attributes:
        units: steps or samples.
        seconds: of all of them, earlier parts of a resumed run included; loading and the self-check
            left out.
        check_seconds: of the self-check.
        peak_memory_bytes: see `memory.peak_bytes`.
        threads: of torch on the CPU.
    """

    units: int
    seconds: float
    check_seconds: float
    peak_memory_bytes: int
    threads: int

    @property
    def seconds_per_unit(self) -> float:
        """Seconds of one step or sample."""
        return self.seconds / max(1, self.units)


def write_results(
    folder: Path, job: Job, scores: Scores, check: CheckResult | None, effort: Effort
) -> HeadPattern:
    """Write every file of the pattern folder; the table comes last, so a folder with it is whole.

    Raises:
        OSError: the folder cannot be written.
    """
    pattern = HeadPattern(scores.values, make_metadata(job, scores, check, effort), folder)
    files: dict[str, bytes] = {
        HEATMAP_NAME: draw_png(
            pattern,
            job.select(pattern, job.settings.check_sparsity),
            f"{display_name(job)}, {job.settings.method}",
        ),
        REPORT_NAME: make_report(job, pattern, check, effort).encode(),
        **{f"{name}.tsv": _table(values) for name, values in scores.query_heads.items()},
        CONFIG_NAME: (json.dumps(pattern.metadata, indent=2, ensure_ascii=False) + "\n").encode(),
        TSV_NAME: _table(pattern.values),
    }
    kept = "the run's checkpoint is kept" if has_checkpoint(folder) else "no result is there yet"
    with explain_full_disk(folder, sum(map(len, files.values())), kept):
        for name, content in files.items():
            write_atomically(folder / name, content)
    return pattern


def make_metadata(
    job: Job, scores: Scores, check: CheckResult | None, effort: Effort
) -> dict[str, Any]:
    """The contents of config.json."""
    settings = job.settings
    pattern = HeadPattern(scores.values)
    return {
        "model_name": display_name(job),
        "method": settings.method,
        "sink_size": settings.sink_size,
        "recent_size": settings.recent_size,
        "deploy_sink_size": settings.sink_size,
        "deploy_recent_size": settings.recent_size,
        "mask_hashes": {
            f"{sparsity:g}": job.select(pattern, sparsity).mask_hash
            for sparsity in COMMON_SPARSITIES
        },
        "settings": settings.model_dump(mode="json"),
        "model": {key: value for key, value in asdict(job.model.info).items() if key != "name"},
        "versions": package_versions(),
        "measured": {**asdict(effort), "seconds_per_unit": effort.seconds_per_unit},
        "self_check": check.to_json() if check else None,
        "details": scores.details,
    }


def display_name(job: Job) -> str:
    """The model's name, of a local folder its last part alone."""
    path = Path(job.model.info.name)
    return path.absolute().name if path.is_dir() else job.model.info.name


def package_versions() -> dict[str, str]:
    """Versions that a result can depend on."""
    packages = installed("vllm-duo", "torch", "transformers", "numpy")
    return {"python": platform.python_version(), **packages}


def make_report(job: Job, pattern: HeadPattern, check: CheckResult | None, effort: Effort) -> str:
    """REPORT.md: can the pattern be trusted, what it was made with, what it took."""
    info, settings = job.model.info, job.settings
    unit = "steps" if settings.method == "gates" else "samples"
    lines = [
        f"# Head pattern of {display_name(job)} by {settings.method}",
        "",
        *_verdict_lines(check),
        "## The pattern",
        "",
        f"{DESCRIPTIONS[settings.method]}. {info.num_layers} layers of {info.num_kv_heads} KV "
        f"heads; a streaming head keeps {settings.sink_size} sink and {settings.recent_size} "
        "recent tokens. `heatmap.png` shows the values, with the retrieval heads at "
        f"sparsity {settings.check_sparsity:g} marked.",
        "",
        "| sparsity | retrieval heads | mask hash |",
        "|---|---|---|",
    ]
    for sparsity in COMMON_SPARSITIES:
        selection = job.select(pattern, sparsity)
        kept = int(selection.retrieval.sum())
        lines.append(f"| {sparsity:g} | {kept} of {pattern.values.size} | {selection.mask_hash} |")
    if info.windows:
        lines += [
            "",
            f"{describe(info.windows)} of the model's own. All of their heads stream, with that "
            "window: their values are 0 and not read. A sparsity is of the other layers' heads.",
        ]
    if settings.method == "exclusive":
        clean = ", ".join(f"{s:.4g}" for s in exclusive_sparsities(len(info.chosen_layers)))
        lines += ["", f"No layer holds both classes at sparsity {clean}."]
    lines += [
        "",
        "Serve it:",
        "",
        "    vllm serve MODEL --attention-backend duo \\",
        '      --additional-config \'{"duo": {"pattern": "THIS FOLDER", "sparsity": '
        f"{settings.check_sparsity:g}}}}}'",
        "",
        "## What it took",
        "",
        f"{effort.units} {unit} in {effort.seconds:.1f} s ({effort.seconds_per_unit:.3g} s each), "
        f"self-check {effort.check_seconds:.1f} s, peak memory "
        f"{effort.peak_memory_bytes / 2**20:.0f} MiB, on {settings.device} ({settings.dtype}, "
        f"{effort.threads} threads). `config.json` has every setting, version and the model's "
        "fingerprint.",
        "",
    ]
    return "\n".join(lines)


def _verdict_lines(check: CheckResult | None) -> list[str]:
    if check is None:
        return ["**Not checked**: the self-check was switched off (--check-samples 0).", ""]
    words = {
        "trusted": f"**This pattern can be trusted at sparsity {check.sparsity:g}**",
        "not trusted": f"**This pattern cannot be trusted at sparsity {check.sparsity:g}**",
        "cannot be judged": "**This pattern could not be judged**",
    }
    rows = [
        ("all heads keep everything", check.full),
        *((f"pattern, {100 * s:g} % of the heads stream", a) for s, a in check.by_sparsity.items()),
        (f"upside down, {100 * check.sparsity:g} % stream", check.inverted),
        ("every head streams", check.streaming),
    ]
    lines = [
        f"{words[check.verdict]}: {check.reason}.",
        "",
        f"Pass keys found in {check.samples} held-back samples of {check.length} tokens, whose key "
        "lies outside of what a streaming head keeps; in brackets the 95 % interval (Wilson):",
        "",
        "| heads | right |",
        "|---|---|",
    ]
    for name, share in rows:
        low, high = wilson_interval(share, check.samples)
        lines.append(f"| {name} | {percent(share)} ({100 * low:.0f}-{100 * high:.0f}) |")
    return [*lines, ""]


def check_can_draw() -> None:
    """Refuse to start a run whose heatmap could not be drawn at its end.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise RuntimeError(
            "identify draws a heatmap and needs matplotlib, which is not installed: "
            "pip install 'vllm-duo[identify]'"
        )
    # Now: after a run that took all memory the library might no longer load.
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401


def _table(values: Floats) -> bytes:
    out = io.BytesIO()
    np.savetxt(out, values, delimiter="\t")
    return out.getvalue()
