"""What a step needs of memory, what there is, and which length would fit."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_duo.identify.available import available_cpu_bytes

if TYPE_CHECKING:
    from vllm_duo.identify.methods import Job
    from vllm_duo.identify.model import HookedModel

SMALLEST_TRIAL = 64
ESTIMATE_MARGIN = 1.5

_SIGNS = ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc")
_SMALLER = "use a machine with more memory, or --dtype bfloat16"


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
    without gradients. The last hidden states count three times in both.

    Example: 4 layers, hidden 128, 8 query heads of size 32, intermediate 256, float32, gradients:
    per token 4 * (4 * 128 + 2 * (12 * 256 + 3 * 256 + 4 * 128) + 3 * 128) = 38,400 bytes.
    """
    config = model.model.config
    hidden = int(config.hidden_size)
    heads = model.info.num_heads * model.info.head_size
    middle = int(getattr(config, "intermediate_size", 0) or 4 * hidden)
    middle *= int(getattr(config, "num_experts_per_tok", 0) or 1)
    number = int(next(model.model.parameters()).element_size())
    layer = 12 * heads + 3 * middle + 4 * hidden
    if gradients:
        per_token = model.info.num_layers * hidden + 2 * layer + 3 * hidden
    else:
        per_token = layer + 3 * hidden
    return number * per_token * length * batch_size


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on the CPU within all limits of this process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_cpu_bytes()


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
    stored = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
    of_file = getattr(config, "dtype", None)
    itemsize = of_file.itemsize if isinstance(of_file, torch.dtype) else dtype.itemsize
    needs = stored * dtype.itemsize / itemsize
    there = available_cpu_bytes()
    if needs > there:
        raise MemoryError(
            f"model {name}: its weights need about {_gib(needs)} in {str(dtype).split('.')[-1]}, "
            f"{_gib(there)} are left: {_SMALLER}"
        )


def explain_while_loading(name: str) -> MemoryError:
    """The error for a model that ran out of memory as it was loaded."""
    return MemoryError(f"model {name}: out of memory while it was loaded: {_SMALLER}")


def explain_after_the_run(length: int) -> MemoryError:
    """The error for a run that ran out of memory in its self-check, or as its results were written.

    Args:
        length: of the self-check's samples, in tokens.
    """
    return MemoryError(
        f"out of memory in the self-check, with samples of {length} tokens; the run's checkpoint is "
        "kept: run the same command with --resume and a shorter --check-length, or with "
        "--check-samples 0"
    )


def check_fits(job: Job) -> None:
    """Refuse a run whose longest step is estimated not to fit, before anything is computed.

    On a CPU the kernel would end the process without a word; on a GPU hours would be lost.

    Raises:
        MemoryError: names the estimate, what there is and the length that fits.
    """
    longest = job.lengths()[1]
    gradients = job.settings.method == "gates"
    batch_size = job.settings.batch_size if gradients else 1
    there = available_bytes(job.model.device)

    def needs(length: int) -> float:
        return ESTIMATE_MARGIN * step_bytes(job.model, length, batch_size, gradients=gradients)

    if needs(longest) > there:
        fits = int(longest * there / needs(longest))
        remedies = [f"--max-length {fits} or less"] * (fits >= job.least_length)
        remedies += ["a smaller --batch-size"] * (batch_size > 1)
        raise MemoryError(
            f"a step of {batch_size} x {longest} tokens needs about {_gib(needs(longest))} beside "
            f"the weights, {job.model.device} has {_gib(there)} left: "
            + (f"use {', or '.join(remedies)}" if remedies else _SMALLER)
        )


def explain_out_of_memory(
    longest: int, batch_size: int, trial: Callable[[int], object]
) -> MemoryError:
    """The error for a step that ran out of memory, with a length that was tried and fits.

    Args:
        longest: tokens of the longest sample.
        batch_size: samples of the step.
        trial: computes one step whose samples have that many tokens.
    """
    length = longest // 2
    while length >= SMALLEST_TRIAL:
        try:
            trial(length)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        except ValueError:
            break  # too short for keys or rule
        else:
            return MemoryError(
                f"out of memory with samples of up to {longest} tokens; {length} was tried and "
                f"fits: use --max-length {length} and start again"
            )
        length //= 2
    return MemoryError(
        f"out of memory with samples of up to {longest} tokens, and with shorter ones too: use "
        f"{'a smaller --batch-size, ' if batch_size > 1 else ''}a larger device, or --dtype bfloat16"
    )


def peak_bytes(device: torch.device) -> int:
    """Highest memory use so far: of the device's tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _gib(amount: float) -> str:
    return f"{amount / 2**30:.1f} GiB" if amount >= 2**30 else f"{amount / 2**20:.0f} MiB"
