"""Kernels that a server may be told to serve the retrieval heads of prefills with, but for Triton's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from vllm_duo.ops.gpu import RetrievalPrefill
from vllm_duo.ops.prefill import flash
from vllm_duo.ops.prefill.flashinfer import FlashInferPrefill


@dataclass(frozen=True)
class Kernel:
    """One of them.

    Attributes:
        name: as ``retrieval_prefill`` has it, with the version.
        make: makes one for a layer. FlashInfer's keeps a plan, which no graph can hold two of.
    """

    name: str
    make: Callable[[], RetrievalPrefill]


def installed() -> Iterator[Kernel]:
    """Those that are to be had here; ``baselines.installed`` says why the others are not."""
    try:
        from vllm_duo.attention.retrieval_prefill import find_flash_attn

        function, fa_version = find_flash_attn(128)
    except Exception:  # ImportError, or what vLLM raises where it is not at home
        pass
    else:
        kernel = functools.partial(
            flash.retrieval_prefill, flash_attn_varlen_func=function, fa_version=fa_version
        )
        yield Kernel(f"flash-attn {fa_version}", lambda: kernel)
    try:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper
    except Exception:  # ImportError, or RuntimeError where flashinfer-cubin is of another version
        return
    workspaces: dict[torch.device, torch.Tensor] = {}
    yield Kernel(
        "flashinfer", lambda: FlashInferPrefill(BatchPrefillWithPagedKVCacheWrapper, workspaces)
    )
