"""Which implementations of the operators would run on this machine, and why not the others."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

CPU_MODULE = "vllm_duo.ops.cpu"
"""Binds the compiled kernels; may be absent from a build without them."""


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One implementation of the operators.

    Attributes:
        name: for people.
        runs: whether the operators would use it here.
        why: the variant and threads where it runs, else what stands against it.
        is_broken: it should run here and cannot.
    """

    name: str
    runs: bool
    why: str
    is_broken: bool = False


def implementations() -> list[Implementation]:
    """All that the package knows, the one that runs on CPU tensors among them."""
    compiled = _compiled()
    return [
        compiled,
        Implementation(
            name="PyTorch references",
            runs=not compiled.runs and not compiled.is_broken,
            why="plain PyTorch, right but not fast"
            if not compiled.runs
            else "the compiled kernels run; VLLM_DUO_OPS=reference selects these",
        ),
        _triton(),
    ]


def _triton() -> Implementation:
    """The kernels for tensors on a GPU."""
    import torch

    name = "Triton GPU kernels"
    if not torch.cuda.is_available():
        return Implementation(name=name, runs=False, why="torch sees no NVIDIA GPU here")
    if find_spec("triton") is None:
        return Implementation(
            name=name, runs=False, why="triton is not installed: pip install triton", is_broken=True
        )
    return Implementation(
        name=name, runs=True, why="for tensors on the GPU; never run on one so far (docs/gpu.md)"
    )


def _compiled() -> Implementation:
    name = "compiled CPU kernels"
    if find_spec(CPU_MODULE) is None:
        return Implementation(name=name, runs=False, why="this build has none")
    try:
        module: Any = importlib.import_module(CPU_MODULE)
    except ImportError as error:
        return Implementation(name=name, runs=False, why=str(error), is_broken=True)
    if module.use_reference:
        return Implementation(
            name=name, runs=False, why="VLLM_DUO_OPS=reference selects the references"
        )
    return Implementation(name=name, runs=True, why=str(module.describe()))
