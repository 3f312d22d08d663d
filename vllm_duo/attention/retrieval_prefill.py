"""Which kernel serves the retrieval heads of a prefill on a GPU: an explicit choice, logged once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, TypeVar

import torch
from packaging.specifiers import SpecifierSet

from vllm_duo.logging import get_logger
from vllm_duo.ops.batch import HeadMap
from vllm_duo.ops.gpu import RetrievalPrefill
from vllm_duo.ops.prefill import flash
from vllm_duo.ops.prefill.flashinfer import FlashInferPrefill, MakeWrapper, Shape

logger = get_logger(__name__)

_Kernel = TypeVar("_Kernel")

Setting = Literal["auto", "triton", "flash-attn", "flashinfer"]

FLASHINFER_VERSIONS = ">=0.7.0,<0.8"
"""vLLM 0.32 asks for 0.7.0.post1, 0.33 for 0.7.2.post1; the call was checked against both
(``tests/contract/test_flashinfer.py``)."""

FLASHINFER_HEAD_SIZES = (64, 128, 256)
FLASHINFER_BLOCK_SIZES = (16, 32, 64)
"""Those that vLLM gives FlashInfer's own kernels; larger ones go to others there."""


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


class _CannotServe(Exception):
    """A kernel that is not for this server, with every reason."""


def choose(
    setting: Setting,
    *,
    dtype: torch.dtype,
    head_size: int,
    block_size: int,
    has_sinks: bool,
    find_flash_attn: Callable[[int], tuple[Callable[..., torch.Tensor], int]],
    find_flashinfer: Callable[[], tuple[MakeWrapper, str]],
) -> Choice:
    """Choose the kernel; FlashInfer only where it is asked for (docs/gpu.md says why).

    Args:
        setting: the server's ``retrieval_prefill``.
        dtype: of queries and caches.
        head_size: D.
        block_size: tokens of a retrieval block.
        has_sinks: whether query heads have learned sinks, of which no other kernel is told.
        find_flash_attn: takes D, returns vLLM's ``flash_attn_varlen_func`` and its version; raises
            ImportError with the reason where there is none.
        find_flashinfer: returns FlashInfer's wrapper class and version, likewise.

    Raises:
        NotImplementedError: the setting names a kernel that cannot serve this.
    """
    by_setting = "set by retrieval_prefill"
    if setting == "triton":
        return Choice("triton", by_setting)
    problems = _dtype_problems(dtype) + _sinks_problems(has_sinks)
    try:
        if setting == "flashinfer":
            problems += _flashinfer_problems(head_size, block_size)
            make_wrapper, name = _found("FlashInfer", problems, find_flashinfer)
            return Choice(f"flashinfer {name}", by_setting, FlashInferPrefill(make_wrapper))
        problems += _flash_attn_problems(head_size, block_size)
        function, fa_version = _found(
            "FlashAttention", problems, lambda: find_flash_attn(head_size)
        )
    except _CannotServe as error:
        if setting == "auto":
            return Choice("triton", str(error))
        raise NotImplementedError(
            f'retrieval_prefill "{setting}": {error}: set "triton" or "auto"'
        ) from error
    kernel = partial(
        flash.retrieval_prefill, flash_attn_varlen_func=function, fa_version=fa_version
    )
    why = by_setting if setting == "flash-attn" else "the default where it runs"
    return Choice(f"flash-attn {fa_version}", why, kernel)


def _found(name: str, problems: list[str], find: Callable[[], _Kernel]) -> _Kernel:
    """What ``find`` returns, unless problems stand against it.

    Raises:
        _CannotServe: they do, or ``find`` raises an ImportError.
    """
    if not problems:
        try:
            return find()
        except ImportError as error:
            problems = [str(error)]
    raise _CannotServe(f"{name} cannot serve this: {'; '.join(problems)}")


def _dtype_problems(dtype: torch.dtype) -> list[str]:
    if dtype in (torch.float16, torch.bfloat16):
        return []
    return [f"it takes float16 and bfloat16, not {dtype}"]


def _sinks_problems(has_sinks: bool) -> list[str]:
    return ["it would leave the model's learned sinks out"] if has_sinks else []


def _flash_attn_problems(head_size: int, block_size: int) -> list[str]:
    problems = []
    if head_size % 8 or head_size > 256:
        problems.append(f"it takes head sizes up to 256 in steps of 8, not {head_size}")
    if block_size % 16:
        problems.append(f"it takes blocks of a multiple of 16 tokens, not {block_size}")
    return problems


def _flashinfer_problems(head_size: int, block_size: int) -> list[str]:
    problems = []
    if head_size not in FLASHINFER_HEAD_SIZES:
        problems.append(
            f"it takes the head sizes {_listed(FLASHINFER_HEAD_SIZES)}, not {head_size}"
        )
    if block_size not in FLASHINFER_BLOCK_SIZES:
        problems.append(
            f"it takes blocks of {_listed(FLASHINFER_BLOCK_SIZES)} tokens (--block-size), "
            f"not {block_size}"
        )
    return problems


def _listed(numbers: tuple[int, ...]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}"


def find_flash_attn(head_size: int) -> tuple[Callable[..., torch.Tensor], int]:
    """Look for the FlashAttention of vLLM.

    Raises:
        ImportError: this vLLM has none for this machine.
    """
    from vllm.v1.attention.backends.fa_utils import (
        get_flash_attn_version,
        is_flash_attn_varlen_func_available,
    )

    number = get_flash_attn_version(head_size=head_size)
    if number is None or not is_flash_attn_varlen_func_available():
        raise ImportError("this vLLM has no FlashAttention for this machine")
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    return flash_attn_varlen_func, number


def find_flashinfer() -> tuple[MakeWrapper, str]:
    """Look for FlashInfer: its wrapper class and version.

    Raises:
        ImportError: it is not installed, not in a version that the call is known to fit, or neither
            finds its kernels here nor can compile them.
    """
    try:
        number = version("flashinfer-python")
    except PackageNotFoundError:
        raise ImportError(
            f'flashinfer-python is not installed (pip install "flashinfer-python{FLASHINFER_VERSIONS}")'
        ) from None
    if number not in SpecifierSet(FLASHINFER_VERSIONS):
        raise ImportError(
            f"flashinfer-python {number} is installed, expected {FLASHINFER_VERSIONS}: install the one "
            "that this vLLM asks for"
        )
    from vllm.utils.flashinfer import has_flashinfer

    if not has_flashinfer():
        raise ImportError(
            f"flashinfer-python {number} finds no kernels here and cannot compile any: put nvcc and "
            "ninja on the path, or run `vllm download-kernels`"
        )
    try:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper
    except Exception as error:  # RuntimeError where flashinfer-cubin is of another version
        raise ImportError(f"flashinfer-python {number} does not import: {error}") from error
    return BatchPrefillWithPagedKVCacheWrapper, number


def layer_kernel(
    setting: Setting,
    heads: HeadMap,
    *,
    dtype: torch.dtype,
    head_size: int,
    block_size: int,
    group: int,
    scale: float,
    has_sinks: bool = False,
) -> RetrievalPrefill | None:
    """The server's kernel, ready for a layer; None: the Triton kernel.

    Args:
        setting: the server's ``retrieval_prefill``.
        heads: the layer's head classes.
        dtype: of queries and caches.
        head_size: D.
        block_size: tokens of a retrieval block.
        group: query heads of a KV head.
        scale: factor on the logits.
        has_sinks: whether the layer has learned sinks.

    Raises:
        NotImplementedError: the setting names a kernel that cannot serve this.
        RuntimeError: the kernel cannot be loaded.
    """
    kernel = server_choice(setting, dtype, head_size, block_size, has_sinks).kernel
    count = len(heads.retrieval)
    if isinstance(kernel, FlashInferPrefill) and count:
        shape = Shape(count * group, count, head_size, block_size, dtype, scale)
        kernel.prepare(heads.retrieval.device, shape)
    return kernel


@cache
def server_choice(
    setting: Setting, dtype: torch.dtype, head_size: int, block_size: int, has_sinks: bool = False
) -> Choice:
    """The choice of a server, made and logged once.

    Raises:
        NotImplementedError: the setting names a kernel that cannot serve this.
    """
    choice = choose_here(setting, dtype, head_size, block_size, has_sinks)
    logger.info(
        "duo: Triton kernels; retrieval heads of prefills: %s (%s)", choice.name, choice.reason
    )
    return choice


def choose_here(
    setting: Setting, dtype: torch.dtype, head_size: int, block_size: int, has_sinks: bool = False
) -> Choice:
    """``choose`` among what this machine has.

    Raises:
        NotImplementedError: the setting names a kernel that cannot serve this.
    """
    return choose(
        setting,
        dtype=dtype,
        head_size=head_size,
        block_size=block_size,
        has_sinks=has_sinks,
        find_flash_attn=find_flash_attn,
        find_flashinfer=find_flashinfer,
    )
