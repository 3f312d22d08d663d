"""Full attention over all KV heads, by every implementation that is installed here.

Each computes the attention of the step's queries and writes nothing, while duo's step also writes the
new keys and values: the comparison favours the baseline. PyTorch's read contiguous keys, which no
serving engine has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.layer import Layer

Run = Callable[[], torch.Tensor]
"""One step; returns the output [T, Hq, D]."""

WORKSPACE_BYTES = 256 << 20
"""What FlashInfer recommends, twice."""


@dataclass(frozen=True)
class Baseline:
    """One implementation.

    Attributes:
        name: with its version.
        prepare: makes a layer's step; what depends on the lengths alone is done here, not timed.
        is_dense: whether it reads ``Layer.dense``, a second copy of the cache.
    """

    name: str
    prepare: Callable[[Layer], Run]
    is_dense: bool = False


def installed(device: torch.device) -> Iterator[Baseline | tuple[str, str]]:
    """Every baseline, or its name and why it is not to be had.

    Args:
        device: where they would run; on a CPU, for tests, PyTorch's plain mathematics.
    """
    if device.type == "cpu":
        yield Baseline(f"torch {torch.__version__} math", plain, is_dense=True)
        return
    try:
        from vllm_duo.attention.retrieval_prefill import find_flash_attn

        function, fa_version = find_flash_attn(128)
        name = f"FlashAttention {fa_version} of vLLM {_version('vllm')}"
        paged = functools.partial(vllm_flash_attention, function=function, fa_version=fa_version)
        yield Baseline(name, paged)
    except Exception as error:  # ImportError, or what vLLM raises where it is not at home
        yield "FlashAttention of vLLM", f"{type(error).__name__}: {error}"
    try:
        import flashinfer  # noqa: F401

        yield Baseline(f"FlashInfer {_version('flashinfer-python')}", flashinfer_paged)
    except ImportError as error:
        yield "FlashInfer", str(error)
    cudnn = torch.backends.cudnn.version()
    if cudnn is None:
        yield "cuDNN through torch", "this torch has no cuDNN"
    else:
        yield Baseline(f"cuDNN {cudnn} through torch", torch_cudnn, is_dense=True)
    yield Baseline(f"FlashAttention 2 of torch {torch.__version__}", torch_flash, is_dense=True)


def vllm_flash_attention(
    layer: Layer, *, function: Callable[..., torch.Tensor], fa_version: int
) -> Run:
    """FlashAttention's paged call as vLLM's own backend makes it, over the shared cache."""
    keys, values = layer.cache.transpose(1, 2).chunk(2, dim=-1)  # [N, P, Hkv, D], strided
    point = layer.point

    def run() -> torch.Tensor:
        return function(
            q=layer.query,
            k=keys,
            v=values,
            cu_seqlens_q=layer.batch.query_start_loc,
            max_seqlen_q=point.chunk,
            seqused_k=layer.batch.seq_lens,
            max_seqlen_k=point.context,
            softmax_scale=_scale(layer),
            causal=True,
            block_table=layer.table,
            fa_version=fa_version,
        )

    return run


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def flashinfer_paged(layer: Layer) -> Run:
    """FlashInfer's batch wrappers over the shared cache (layout HND), planned beforehand.

    Each layer has a wrapper and a plan of its own; the workspace is shared, since steps take turns.
    """
    import flashinfer

    point, shape = layer.point, layer.point.shape
    width = layer.table.shape[1]
    pages = torch.arange(point.requests + 1, dtype=torch.int32, device=layer.device) * width
    last = torch.full_like(pages[1:], (point.context - 1) % shape.block_size + 1)
    where = (pages, layer.table.flatten(), last)
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_size, shape.block_size)
    types = {"q_data_type": layer.query.dtype, "kv_data_type": layer.cache.dtype}
    workspace = _workspace(layer.device)
    if point.kind == "decode":
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=True
        )
        wrapper.plan(*where, *heads, **types)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(layer.batch.query_start_loc, *where, *heads, causal=True, **types)
    keys, values = layer.cache.chunk(2, dim=-1)  # [N, Hkv, P, D], strided
    output = torch.empty_like(layer.query)

    def run() -> torch.Tensor:
        return wrapper.run(layer.query, (keys, values), out=output)

    return run


def torch_flash(layer: Layer) -> Run:
    """PyTorch's own FlashAttention, whose ``is_causal`` is aligned to the last key."""
    query, keys, values = _torch_inputs(layer)
    causal = layer.point.kind == "prefill"
    attend = torch.ops.aten._scaled_dot_product_flash_attention

    def run() -> torch.Tensor:
        return _tokens(attend(query, keys, values, 0.0, causal, False, scale=_scale(layer))[0])

    return run


def torch_cudnn(layer: Layer) -> Run:
    """CuDNN's attention through PyTorch.

    Its ``is_causal`` is aligned to the first key, so a chunk behind a context is two calls, over the
    context and over the chunk, merged by their log-sum-exps. Where this torch does not let query heads
    share a KV head, KV heads are repeated beforehand.
    """
    query, keys, values = _torch_inputs(layer)
    before = layer.point.before
    group = query.shape[1] // keys.shape[1]

    def attend(piece: slice, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query,
            keys[:, :, piece],
            values[:, :, piece],
            None,
            True,
            0.0,
            causal,
            False,
            scale=_scale(layer),
        )
        return out, lse.reshape(*out.shape[:3], 1)

    def run() -> torch.Tensor:
        if layer.point.kind == "decode":
            return _tokens(attend(slice(None), False)[0])
        own, own_lse = attend(slice(before, None), True)
        if before == 0:
            return _tokens(own)
        seen, seen_lse = attend(slice(before), False)
        return _tokens(merge(seen, seen_lse, own, own_lse))

    if group > 1:
        try:
            run()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
    return run


def merge(
    first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor
) -> torch.Tensor:
    """Attention over two sets of keys from that over each.

    Args:
        first: [..., D].
        first_lse: [..., 1] float32, natural logarithm of the sum of exponentials.
        second: like ``first``.
        second_lse: like ``first_lse``.
    """
    share = torch.sigmoid(second_lse - first_lse).to(first.dtype)
    return torch.lerp(first, second, share)


def plain(layer: Layer) -> Run:
    """PyTorch's mathematics with a mask; for tests on the CPU."""
    query, keys, values = _torch_inputs(layer)
    point = layer.point
    positions = torch.arange(point.context, device=layer.device)
    mask = positions[None, :] <= positions[point.before :, None]

    def run() -> torch.Tensor:
        return _tokens(
            torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, enable_gqa=True
            )
        )

    return run


def _torch_inputs(layer: Layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [B, Hq, chunk, D]; keys and values [B, Hkv, context, D]."""
    point, shape = layer.point, layer.point.shape
    sizes = (point.requests, point.chunk, shape.num_heads, shape.head_size)
    return (layer.query.view(sizes).transpose(1, 2), *layer.dense)


def _tokens(out: torch.Tensor) -> torch.Tensor:
    """[T, Hq, D] of [B, Hq, chunk, D]; a copy only where the kernel has chosen another order."""
    return out.transpose(1, 2).flatten(0, 1)


def _scale(layer: Layer) -> float:
    return float(layer.point.shape.head_size**-0.5)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
