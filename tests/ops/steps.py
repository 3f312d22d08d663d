"""One step over filled caches, for kernels that serve a step at a time.

A case fills the caches with the PyTorch reference and runs one step with one kernel.
"""

from __future__ import annotations

import dataclasses
import mmap
from dataclasses import dataclass

import numpy as np
import torch

from tests.ops.oracle import Store, dense_attention, make_sinks
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches
from vllm_duo.ops.write_kv import reference

MAP_NORESERVE = 0x4000  # Linux; Python 3.11 does not name it


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
    heads: HeadMap
    sinks: torch.Tensor | None = None

    def run(self, kernel, **kwargs):
        """Output of an attention kernel, NaN where it wrote nothing."""
        output = torch.full_like(self.q, torch.nan)
        args = (self.q, self.k, self.v, self.heads, self.caches, self.batch, self.scale)
        kernel(*args, output, sinks=self.sinks, **kwargs)
        return output

    def exact(self, dtype=torch.float64):
        """[T, Hq, D] of ``dtype`` from dense attention over the whole sequences."""
        store = self.store
        sinks = self.sinks if self.sinks is None else self.sinks.cpu()
        rule = (self.mask, store.ring.sink_size, store.ring.recent_size, self.scale, dtype)
        rows = [
            dense_attention(q, k, v, *rule, sinks=sinks)[len(q) - chunk :]
            for (q, k, v), chunk in zip(self.sequences, self.batch.query_lens, strict=True)
        ]
        return torch.cat(rows)

    def assert_exact(self, output, rows=slice(None)):
        """Error at most twice that of the same maths in the kernel's dtype; padding untouched."""
        exact = self.exact()
        plain = self.exact(self.q.dtype).double()
        bound = 2 * (plain - exact).abs().max() + 8 * torch.finfo(torch.float32).eps
        bound += torch.finfo(self.q.dtype).eps * exact.abs().max()
        served = output[: len(exact)].cpu().double()
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
    sinks=None,
    **sizes,
):
    """A step of requests with these contexts and chunks; ``num_decodes`` defaults to all.

    ``sinks`` names learned sinks (``oracle.SINKS``); by default there are none.
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
    return Step(
        store,
        sequences,
        batch,
        store.caches,
        q,
        k,
        v,
        list(mask),
        head_size**-0.5,
        store.heads,
        sinks and make_sinks(sinks, heads * group, seed),
    )


def on_device(step, device):
    """The same step with its tensors on a device; the store stays where it is."""

    def moved(table):
        return table and dataclasses.replace(table, block_table=table.block_table.to(device))

    caches, heads, batch = step.caches, step.store.heads, step.batch
    return dataclasses.replace(
        step,
        heads=HeadMap(heads.retrieval.to(device), heads.streaming.to(device)),
        batch=Batch.from_host(
            batch.host_query_start_loc, batch.host_seq_lens, batch.num_decodes, device
        ),
        caches=LayerCaches(
            caches.retrieval if caches.retrieval is None else caches.retrieval.to(device),
            moved(caches.paged),
            caches.streaming if caches.streaming is None else caches.streaming.to(device),
            moved(caches.ring),
        ),
        q=step.q.to(device),
        k=step.k.to(device),
        v=step.v.to(device),
        sinks=None if step.sinks is None else step.sinks.to(device),
    )


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


def guards(step):
    """Streaming blocks of no table."""
    blocks = torch.ones(len(step.caches.streaming), dtype=torch.bool)
    blocks[step.store.ring.block_table.flatten().long()] = False
    blocks[0] = False
    return blocks.nonzero().flatten()
