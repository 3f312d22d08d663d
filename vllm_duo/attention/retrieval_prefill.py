"""Which kernel serves the retrieval heads of a prefill on a GPU: an explicit choice, logged once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch

from vllm_duo.logging import get_logger
from vllm_duo.ops.gpu import RetrievalPrefill
from vllm_duo.ops.prefill import flash

logger = get_logger(__name__)

Setting = Literal["auto", "triton", "flash-attn", "flashinfer"]


@dataclass(frozen=True)
class Choice:
    """A kernel, and why.

    Attributes:
        name: for logs and people.
        reason: why this one.
        kernel: None for the Triton kernel, which serves both classes in one launch.
    """

    name: str
    reason: str
    kernel: RetrievalPrefill | None = None


def choose(
    setting: Setting,
    *,
    dtype: torch.dtype,
    head_size: int,
    block_size: int,
    find_flash_attn: Callable[[int], tuple[Callable[..., torch.Tensor], int]],
) -> Choice:
    """Choose the kernel.

    Args:
        setting: the server's ``retrieval_prefill``.
        dtype: of queries and caches.
        head_size: D.
        block_size: tokens of a retrieval block.
        find_flash_attn: takes D, returns vLLM's ``flash_attn_varlen_func`` and its version; raises
            ImportError with the reason where there is none.

    Raises:
        NotImplementedError: the setting names a kernel that cannot serve this.
    """
    if setting == "triton":
        return Choice("triton", "set by retrieval_prefill")
    if setting == "flashinfer":
        raise NotImplementedError(
            'retrieval_prefill "flashinfer" is not connected yet: set "flash-attn", "triton" or "auto"'
        )
    problems = []
    if dtype not in (torch.float16, torch.bfloat16):
        problems.append(f"it takes float16 and bfloat16, not {dtype}")
    if head_size % 8 or head_size > 256:
        problems.append(f"it takes head sizes up to 256 in steps of 8, not {head_size}")
    if block_size % 16:
        problems.append(f"it takes blocks of a multiple of 16 tokens, not {block_size}")
    if not problems:
        try:
            function, version = find_flash_attn(head_size)
        except ImportError as error:
            problems.append(str(error))
    if problems:
        why = "FlashAttention cannot serve this: " + "; ".join(problems)
        if setting == "flash-attn":
            raise NotImplementedError(
                f'retrieval_prefill "flash-attn": {why}: set "triton" or "auto"'
            )
        return Choice("triton", why)
    kernel = partial(flash.retrieval_prefill, flash_attn_varlen_func=function, fa_version=version)
    why = "set by retrieval_prefill" if setting == "flash-attn" else "the default where it runs"
    return Choice(f"flash-attn {version}", why, kernel)


def find_flash_attn(head_size: int) -> tuple[Callable[..., torch.Tensor], int]:
    """Look for the FlashAttention of vLLM.

    Raises:
        ImportError: this vLLM has none for this machine.
    """
    from vllm.v1.attention.backends.fa_utils import (
        get_flash_attn_version,
        is_flash_attn_varlen_func_available,
    )

    version = get_flash_attn_version(head_size=head_size)
    if version is None or not is_flash_attn_varlen_func_available():
        raise ImportError("this vLLM has no FlashAttention for this machine")
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    return flash_attn_varlen_func, version


@cache
def server_choice(setting: Setting, dtype: torch.dtype, head_size: int, block_size: int) -> Choice:
    """The choice of a server, made and logged once.

    Raises:
        NotImplementedError: the setting names a kernel that cannot serve this.
    """
    choice = choose(
        setting,
        dtype=dtype,
        head_size=head_size,
        block_size=block_size,
        find_flash_attn=find_flash_attn,
    )
    logger.info(
        "duo: Triton kernels; retrieval heads of prefills: %s (%s)", choice.name, choice.reason
    )
    return choice
