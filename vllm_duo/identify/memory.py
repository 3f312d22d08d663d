"""What a step needs of memory, what there is, and which length would fit."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_duo.identify.available import available_cpu_bytes
from vllm_duo.identify.checkpoint import has_checkpoint
from vllm_duo.identify.mxfp4 import is_mxfp4, plain_numbers
from vllm_duo.logging import get_logger

if TYPE_CHECKING:
    from vllm_duo.identify.methods import Job
    from vllm_duo.identify.model import HookedModel

ESTIMATE_MARGIN = 1.5
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

_SIGNS = ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc")
_SMALLER = "use a machine with more memory, or --dtype bfloat16"

logger = get_logger(__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def step_bytes(model: HookedModel, length: int, batch_size: int, *, gradients: bool) -> int:
    """Bytes that one step needs beside the weights, by count of its tensors.

    With gradients, per token: the input of every layer, and of one layer, computed again, what its
    backward pass needs: queries, keys, values and outputs of both attentions and the blocks of the
    streaming one, and the MLP's three intermediates, each with its gradient. Without: one layer's,
    without gradients. The last hidden states count three times in both. With learned sinks each of the
    two attentions has queries and outputs of its own.

    Example: 4 layers, hidden 128, 8 query heads of size 32, intermediate 256, float32, gradients:
    per token 4 * (4 * 128 + 2 * (12 * 256 + 3 * 256 + 4 * 128) + 3 * 128) = 38,400 bytes.
    """
    config = model.model.config.get_text_config(decoder=True)
    hidden = int(config.hidden_size)
    heads = model.info.num_heads * model.info.head_size
    middle = int(getattr(config, "intermediate_size", 0) or 4 * hidden)
    middle *= int(getattr(config, "num_experts_per_tok", 0) or 1)
    number = int(next(model.model.parameters()).element_size())
    layer = (12 + 4 * model.info.learned_sinks) * heads + 3 * middle + 4 * hidden
    if gradients:
        per_token = model.info.num_layers * hidden + 2 * layer + 3 * hidden
    else:
        per_token = layer + 3 * hidden
    return number * per_token * length * batch_size


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; on the CPU within all limits of this process.

    None where the system does not tell; that is logged once.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    there = available_cpu_bytes()
    if there is None:
        _log_unknown()
    return there


@cache
def _log_unknown() -> None:
    logger.warning(
        "this system does not tell how much memory is left (no /proc/meminfo): weights and steps are "
        "not held against it before they are loaded and computed"
    )


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that transformers loads from a folder; empty: it has none of them.

    One file goes before shards, as in transformers. What lies beside them does not count: weights in
    the format of their maker (``consolidated.safetensors``), adapters.
    """
    files = {WEIGHTS_NAME}
    if not (folder / WEIGHTS_NAME).is_file():
        try:
            files = set(json.loads((folder / INDEX_NAME).read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []  # transformers says what is wrong with it
    return [folder / file for file in files if (folder / file).is_file()]


def weight_bytes(folder: Path) -> int:
    """Bytes of `weight_files`."""
    return sum(file.stat().st_size for file in weight_files(folder))


def check_weights_fit(name: str, config: Any, dtype: torch.dtype) -> None:
    """Refuse a model whose weights do not fit the machine's memory, before they are loaded.

    The kernel would end the process without a word. Models that are not in a folder are not looked at.

    Args:
        name: of the model.
        config: of transformers.
        dtype: of the weights once they are loaded.

    Raises:
        MemoryError: names what they need and what there is.
    """
    if is_mxfp4(config):
        needs = float(plain_numbers(weight_files(Path(name))) * dtype.itemsize)
    else:
        of_file = getattr(config, "dtype", None)
        itemsize = of_file.itemsize if isinstance(of_file, torch.dtype) else dtype.itemsize
        needs = weight_bytes(Path(name)) * dtype.itemsize / itemsize
    there = available_bytes(torch.device("cpu"))  # they are loaded there first, whatever the device
    if there is not None and needs > there:
        raise MemoryError(
            f"model {name}: its weights need about {_gib(needs)} in {str(dtype).split('.')[-1]}, "
            f"{_gib(there)} are left: {_SMALLER}"
        )


def explain_while_loading(name: str) -> MemoryError:
    """The error for a model that ran out of memory as it was loaded."""
    return MemoryError(f"model {name}: out of memory while it was loaded: {_SMALLER}")


@contextmanager
def explain_after_the_run(where: str, remedy: str, folder: Path) -> Iterator[None]:
    """Say what to do when memory runs out once the heads are found.

    Args:
        where: it runs out, in words.
        remedy: what to run the same command with.
        folder: of the run, which holds its checkpoint if the method has any.

    Raises:
        MemoryError: names the place, what is kept and the remedy.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        kept, resume = "no result is there yet", ""
        if has_checkpoint(folder):
            kept, resume = "the run's checkpoint is kept", "--resume and "
        raise MemoryError(
            f"out of memory {where}; {kept}: run the same command with {resume}{remedy}"
        ) from None


def check_fits(job: Job, min_length: int | None) -> None:
    """Refuse a run whose longest step is estimated not to fit, before anything is computed.

    On a CPU the kernel would end the process without a word; on a GPU hours would be lost.

    Args:
        job: model and settings.
        min_length: that the user gave, in tokens; None: none.

    Raises:
        MemoryError: names the estimate, what there is and the length that fits.
    """
    longest = job.lengths()[1]
    gradients = job.settings.method == "gates"
    batch_size = job.settings.batch_size if gradients else 1
    there = available_bytes(job.model.device)

    def needs(length: int) -> float:
        return ESTIMATE_MARGIN * step_bytes(job.model, length, batch_size, gradients=gradients)

    if there is not None and needs(longest) > there:
        fits = int(longest * there / needs(longest))
        shorter = f"--max-length {fits} or less{_lower(min_length, fits)}"
        remedies = [shorter] * (fits >= job.least_length)
        remedies += ["a smaller --batch-size"] * (batch_size > 1)
        raise MemoryError(
            f"a step of {batch_size} x {longest} tokens needs about {_gib(needs(longest))} beside "
            f"the weights, {job.model.device} has {_gib(there)} left: "
            + (f"use {', or '.join(remedies)}" if remedies else _SMALLER)
        )


def explain_out_of_memory(
    job: Job, min_length: int | None, trial: Callable[[int], object]
) -> MemoryError:
    """The error for a step that ran out of memory, with a length that was tried and fits.

    Args:
        job: model and settings.
        min_length: that the user gave, in tokens; None: none.
        trial: computes one step whose samples have that many tokens.
    """
    longest, least = job.lengths()[1], job.least_length
    length, shorter = longest, ""
    while length > least:
        length = max(length // 2, least)
        try:
            trial(length)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            shorter = ", and with shorter ones too"
        except ValueError:
            break  # too short for keys or rule
        else:
            return MemoryError(
                f"out of memory with samples of up to {longest} tokens; {length} was tried and "
                f"fits: use --max-length {length}{_lower(min_length, length)} and start again"
            )
    smaller = job.settings.method == "gates" and job.settings.batch_size > 1
    return MemoryError(
        f"out of memory with samples of up to {longest} tokens{shorter}: use "
        f"{'a smaller --batch-size, ' if smaller else ''}a larger device, or --dtype bfloat16"
    )


def _lower(min_length: int | None, length: int) -> str:
    """What else must be lowered for samples of up to `length` tokens, in words."""
    too_long = min_length is not None and min_length > length
    return f" and --min-length at most {length}" if too_long else ""


def peak_bytes(device: torch.device) -> int:
    """Highest memory use so far: of the device's tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def _gib(amount: float) -> str:
    return f"{amount / 2**30:.1f} GiB" if amount >= 2**30 else f"{amount / 2**20:.0f} MiB"
