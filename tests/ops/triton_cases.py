"""The Triton kernels in Triton's interpreter, and one-step cases for them.

A case fills the caches with the PyTorch reference and runs one step with one kernel, since the
interpreter takes about a hundred microseconds an operation.
"""

from __future__ import annotations

import dataclasses
import mmap
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import triton
from triton.runtime import interpreter

from tests.conftest import HAS_DEVICE
from tests.ops.oracle import Store, dense_attention
from vllm_duo.ops.batch import Batch, LayerCaches
from vllm_duo.ops.write_kv import reference

if HAS_DEVICE:
    pytest.skip(
        "these cases run the kernels in Triton's interpreter, for machines without a GPU; here "
        "test_gpu_kernels.py runs them on the device",
        allow_module_level=True,
    )

with triton.knobs.runtime.scope():
    triton.knobs.runtime.interpret = True
    from vllm_duo.ops.decode import triton as decode_kernel
    from vllm_duo.ops.prefill import triton as prefill_kernel
    from vllm_duo.ops.snapshot import triton as snapshot_kernel
    from vllm_duo.ops.write_kv import triton as write_kernel

assert decode_kernel.fold_slots.__class__ is interpreter.InterpretedFunction

__all__ = ["decode_kernel", "prefill_kernel", "snapshot_kernel", "write_kernel"]


MAP_NORESERVE = 0x4000  # Linux; Python 3.11 does not name it


@pytest.fixture(autouse=True)
def implementation(monkeypatch):
    """Interpret, and faster than the interpreter does by itself.

    Triton 3.9 patches its language anew in every call of a device function: once a launch is enough.
    Its checks for int32 overflow triple the operations: `checked` turns them on where they matter.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    patch_lang = interpreter._patch_lang
    patched = set()

    class Scope:
        def __init__(self, scope):
            self.scope = scope

        def restore(self):
            patched.clear()
            self.scope.restore()

    def patch_once(function):
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return Scope(patch_lang(function))

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    options = interpreter.interpreter_builder.options
    quick = dataclasses.replace(options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", quick)
    return "triton"


@pytest.fixture
def checked(implementation, monkeypatch):
    """Let the interpreter check int32 arithmetic for overflow."""
    options = interpreter.interpreter_builder.options
    checking = dataclasses.replace(options, sanitize_overflow=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", checking)


@dataclass
class Step:
    """One step over filled caches, and the whole sequences behind it."""

    store: Store
    sequences: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    batch: Batch
    caches: LayerCaches
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: list[bool]
    scale: float

    def run(self, kernel, **kwargs):
        """Output of an attention kernel, NaN where it wrote nothing."""
        output = torch.full_like(self.q, torch.nan)
        args = (self.q, self.k, self.v, self.store.heads, self.caches, self.batch, self.scale)
        kernel(*args, output, **kwargs)
        return output

    def exact(self, dtype=torch.float64):
        """[T, Hq, D] of ``dtype`` from dense attention over the whole sequences."""
        store = self.store
        rows = [
            dense_attention(
                q, k, v, self.mask, store.ring.sink_size, store.ring.recent_size, self.scale, dtype
            )[len(q) - chunk :]
            for (q, k, v), chunk in zip(self.sequences, self.batch.query_lens, strict=True)
        ]
        return torch.cat(rows)

    def assert_exact(self, output, rows=slice(None)):
        """Error at most twice that of the same maths in the kernel's dtype; padding untouched."""
        exact = self.exact()
        plain = self.exact(self.q.dtype).double()
        bound = 2 * (plain - exact).abs().max() + 8 * torch.finfo(torch.float32).eps
        bound += torch.finfo(self.q.dtype).eps * exact.abs().max()
        served = output[: len(exact)].double()
        assert (served - exact)[rows].abs().max() <= bound
        assert output[len(exact) :].isnan().all()


def make_step(
    mask,
    contexts,
    chunks,
    *,
    group=2,
    head_size=64,
    dtype=torch.float32,
    num_decodes=None,
    draft_size=0,
    seed=0,
    padding=3,
    **sizes,
):
    """A step of requests with these contexts and chunks; ``num_decodes`` defaults to all.

    Requests of no tokens at all take part like a serving framework's padding.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = len(mask)

    def random(n, h, factor=1.0):
        return (factor * torch.randn(n, h, head_size, generator=generator)).to(dtype)

    # Keys twice as large as usual: attention with clear peaks shows a wrong key.
    sequences = [
        (random(n, heads * group), random(n, heads, 2.0), random(n, heads))
        for n in map(sum, zip(contexts, chunks, strict=True))
    ]
    store = Store(
        mask,
        head_size,
        requests=len(chunks),
        max_tokens=max(map(sum, zip(contexts, chunks, strict=True))) or 1,
        dtype=dtype,
        seed=seed,
        draft_size=draft_size,
        **sizes,
    )
    fill(store, sequences, contexts)
    starts = np.cumsum([0, *chunks])
    lens = np.array(contexts) + chunks
    batch = Batch.from_host(starts, lens, len(chunks) if num_decodes is None else num_decodes)

    def take(index):
        rows = [s[index][context:] for s, context in zip(sequences, contexts, strict=True)]
        unused = torch.full((padding, *rows[0].shape[1:]), torch.nan, dtype=dtype)
        return torch.cat([*rows, unused])

    q, k, v = take(0), take(1), take(2)
    return Step(store, sequences, batch, store.caches, q, k, v, list(mask), head_size**-0.5)


def fill(store, sequences, contexts):
    """Write every request's context with the reference."""
    starts = np.cumsum([0, *contexts])
    batch = Batch.from_host(starts, np.array(contexts), 0)
    k = torch.cat([s[1][:n] for s, n in zip(sequences, contexts, strict=True)])
    v = torch.cat([s[2][:n] for s, n in zip(sequences, contexts, strict=True)])
    reference.write_retrieval(k, v, store.heads, store.caches, batch)
    reference.write_streaming(k, v, store.heads, store.caches, batch)


def clone(caches):
    """Caches of the same contents and tables."""
    return LayerCaches(
        None if caches.retrieval is None else caches.retrieval.clone(),
        caches.paged,
        None if caches.streaming is None else caches.streaming.clone(),
        caches.ring,
    )


def far_apart(cache, table):
    """The same blocks 2 GiB apart, in virtual memory of which little is ever touched."""
    stride = 2**30 + 16
    assert cache.element_size() == 2
    assert int(table.block_table.max()) * stride > 2**31
    elements = stride * len(cache)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, elements * cache.element_size(), flags=flags)
    flat = torch.frombuffer(memory, dtype=cache.dtype)
    far = flat.as_strided(cache.shape, (stride, *cache.stride()[1:]))
    far.copy_(cache)
    return far
