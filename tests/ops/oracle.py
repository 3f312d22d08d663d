"""Dense attention with the rule as a mask, and a small paged store to feed the operators.

Written without the package's operators: the store lays tokens out by the documented slots, the
oracle sees whole sequences.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch

from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches, PagedTable, RingTable
from vllm_duo.ops.decode import decode
from vllm_duo.ops.layer import attend_and_write
from vllm_duo.ops.prefill import prefill
from vllm_duo.ops.snapshot import copy_snapshots
from vllm_duo.ops.write_kv import write_kv

SINKS = {
    # As large as the greatest logits of the random keys.
    "ordinary": [-3.0, -1.0, 0.0, 1.0, 2.5, 4.0, 6.0, 9.0],
    # Beyond what float32 has as a power, and as far as that itself goes.
    "extreme": [-torch.inf, -1e38, -1e4, -90.0, 60.0, 87.0, 89.0, 130.0, 1e4, 1e38],
}


def make_sinks(kind, heads, seed=0):
    """[heads] float32, learned sinks of one of the ``SINKS``."""
    picked = np.random.default_rng(seed).choice(SINKS[kind], heads)
    return torch.tensor(picked, dtype=torch.float32)


def dense_attention(
    q, k, v, retrieval, sink_size, recent_size, scale, dtype=torch.float64, *, sinks=None
):
    """Attention of one whole sequence.

    q [n, Hq, D], k and v [n, Hkv, D], retrieval [Hkv] bool, sinks [Hq] learned logits or None;
    returns [n, Hq, D] of ``dtype``.
    """
    n, num_heads, _ = q.shape
    group = num_heads // k.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    out = torch.empty(q.shape, dtype=dtype)
    for head in range(num_heads):
        kv = head // group
        mask = j <= i
        if not retrieval[kv]:
            mask &= (j < sink_size) | (j > i - recent_size)
        logits = (q[:, head].to(dtype) @ k[:, kv].to(dtype).T) * scale
        logits = logits.masked_fill(~mask, -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[head].to(dtype).expand(n, 1)], -1)
        out[:, head] = logits.softmax(-1)[:, :n] @ v[:, kv].to(dtype)
    return out


ORDERS = 4
"""Of a sum of products, when the error of float32 is asked for."""


def float32_error(exact, q, k, v, *rule, sinks=None):
    """Largest error of ``dense_attention`` in float32, over several orders of each sum of products.

    One order alone can be exact by luck: over 32 orders of the same 69 keys the largest errors were
    between 0.9e-6 and 2.5e-6.
    """
    worst = torch.zeros((), dtype=torch.float64)
    for seed in range(ORDERS):
        order = torch.randperm(q.shape[-1], generator=torch.Generator().manual_seed(seed))
        plain = dense_attention(q[..., order], k[..., order], v, *rule, torch.float32, sinks=sinks)
        worst = torch.maximum(worst, (plain - exact).abs().max())
    return worst


@dataclass
class Sequence:
    """A request's random tensors and how many of its tokens have been served."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    done: int = 0
    outputs: list[torch.Tensor] = field(default_factory=list)


class Store:
    """Caches of one layer filled with NaN, one table row per request, guard blocks between."""

    def __init__(
        self,
        retrieval,
        head_size,
        *,
        requests,
        max_tokens,
        block_size=16,
        streaming_block_size=8,
        sink_size=20,
        recent_size=75,
        dtype=torch.float32,
        seed,
        draft_size=0,
        form=None,
        streaming_quantised=True,
        scales=(1.0, 1.0),
        sinks=None,
    ):
        self.sinks = sinks
        rng = np.random.default_rng(seed)
        retrieval = np.asarray(retrieval, dtype=bool)
        self.heads = HeadMap.from_mask(retrieval, torch.device("cpu"))
        num_r, num_s = int(retrieval.sum()), int((~retrieval).sum())
        width = -(-max_tokens // block_size)
        ring_size = recent_size + draft_size
        ring_width = -(-sink_size // streaming_block_size) - (-ring_size // streaming_block_size)
        # Both caches get twice the blocks they need: the others are guards.
        ids = rng.permutation(np.arange(1, 2 * requests * width + 1))[: requests * width]
        ring_ids = rng.permutation(np.arange(1, 2 * requests * ring_width + 1))
        ring_ids = ring_ids[: requests * ring_width]
        self.paged = PagedTable(torch.from_numpy(ids.reshape(requests, width)).int(), block_size)
        self.ring = RingTable(
            torch.from_numpy(ring_ids.reshape(requests, ring_width)).int(),
            streaming_block_size,
            sink_size,
            recent_size,
            ring_size,
        )

        def cache(blocks, heads, size, form=form):
            if form is None:
                return torch.full((blocks, heads, size, 2 * head_size), torch.nan, dtype=dtype)
            # Ones everywhere are NaN in float8, and in the scales of integers.
            shape = (blocks, heads, size, form.row_bytes(head_size))
            return torch.full(shape, 255, dtype=torch.uint8)

        self.caches = LayerCaches(
            retrieval=cache(2 * requests * width + 1, num_r, block_size) if num_r else None,
            paged=self.paged if num_r else None,
            streaming=cache(
                2 * requests * ring_width + 1,
                num_s,
                streaming_block_size,
                form if streaming_quantised else None,
            )
            if num_s
            else None,
            ring=self.ring if num_s else None,
            form=form,
            streaming_quantised=streaming_quantised,
            key_scale=scales[0],
            value_scale=scales[1],
        )

    def assert_guards(self):
        """Blocks of no table, the null block among them, are still untouched."""
        for cache, table in (
            (self.caches.retrieval, self.paged),
            (self.caches.streaming, self.ring),
        ):
            if cache is None:
                continue
            guard = torch.ones(len(cache), dtype=torch.bool)
            guard[table.block_table.flatten().long()] = False
            assert (
                cache[guard] == 255 if cache.dtype == torch.uint8 else cache[guard].isnan()
            ).all()


def contiguous(tensor):
    """A copy of its own."""
    return tensor.clone()


def fused(tensor):
    """Heads in the middle of wider rows, as in the output of one projection for q, k and v."""
    n, heads, size = tensor.shape
    wide = torch.full((n, heads + 3, size), torch.nan, dtype=tensor.dtype)
    wide[:, 1:-2] = tensor
    return wide[:, 1:-2]


def heads_first(tensor):
    """Each head's tokens side by side, a few elements between the heads."""
    n, heads, size = tensor.shape
    wide = torch.full((heads, n + 1, size), torch.nan, dtype=tensor.dtype)
    wide[:, :n] = tensor.transpose(0, 1)
    return wide[:, :n].transpose(0, 1)


MEMORY_LAYOUTS = (contiguous, fused, heads_first)
# A model that normalises its keys (Qwen3) has them contiguous and the values still fused.
QWEN3 = (contiguous, contiguous, fused, contiguous)


def heads_within_tokens(cache):
    """The same [N, H, P, row] with a token's heads side by side."""
    return cache.transpose(1, 2).contiguous().transpose(1, 2)


def slots_apart(cache):
    """The same with a few elements between the slots."""
    return torch.cat([cache, torch.full_like(cache[..., :16], torch.nan)], -1)[..., :-16]


CACHE_LAYOUTS = (heads_within_tokens, slots_apart)


def run_step(
    store,
    sequences,
    chunks,
    scale,
    *,
    decode_up_to=1,
    layouts=QWEN3,
    rows=None,
    copies=(),
    one_call=False,
):
    """Serve ``chunks[i]`` tokens of each sequence in one step, decodes first.

    Sequences that get no tokens take part as empty requests. ``layouts`` says how query, key, value
    and output lie in memory, ``rows`` which table row each sequence has (default: its own number),
    ``copies`` which snapshots the step makes and uses. With ``one_call`` the layer's step runs as it
    is served, else operator by operator, whose parts are checked.
    """
    order = sorted(range(len(sequences)), key=lambda i: chunks[i] > decode_up_to)
    num_decodes = sum(chunks[i] <= decode_up_to for i in order)
    starts = np.cumsum([0] + [chunks[i] for i in order])
    lens = [sequences[i].done + chunks[i] for i in order]
    batch = Batch.from_host(starts, lens, num_decodes)
    rows = torch.tensor([i if rows is None else rows[i] for i in order])
    caches = dataclasses.replace(
        store.caches,
        paged=PagedTable(store.paged.block_table[rows], store.paged.block_size)
        if store.caches.paged is not None
        else None,
        ring=RingTable(
            store.ring.block_table[rows],
            store.ring.block_size,
            store.ring.sink_size,
            store.ring.recent_size,
            store.ring.ring_size,
            tuple(copies),
        )
        if store.caches.ring is not None
        else None,
    )

    def take(name):
        parts = [getattr(sequences[i], name)[sequences[i].done :][: chunks[i]] for i in order]
        # One row of padding, as a serving framework may add.
        return torch.cat(
            [
                *parts,
                torch.full_like(sequences[0].q[:1], torch.nan)
                if name == "q"
                else torch.full_like(sequences[0].k[:1], torch.nan),
            ]
        )

    q, k, v = (layout(take(name)) for layout, name in zip(layouts, "qkv", strict=False))
    output = layouts[3](torch.full(q.shape, torch.nan, dtype=q.dtype))
    if one_call:
        attend_and_write(q, k, v, store.heads, caches, batch, scale, output, sinks=store.sinks)
    else:
        copy_snapshots(k, v, store.heads, caches, batch)
        decode(q, k, v, store.heads, caches, batch, scale, output, store.sinks)
        assert output[batch.num_decode_tokens :].isnan().all()
        prefill(q, k, v, store.heads, caches, batch, scale, output, store.sinks)
        write_kv(k, v, store.heads, caches, batch)
    assert output[batch.num_tokens :].isnan().all()
    around = output if output._base is None else output._base
    assert (~around.isnan()).sum() == (~output.isnan()).sum()
    for slot, i in enumerate(order):
        sequences[i].outputs.append(output[starts[slot] : starts[slot + 1]])
        sequences[i].done += chunks[i]
