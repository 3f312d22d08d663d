"""FlashInfer's paged prefill wrapper as its documentation describes it, in plain float64.

What it computes comes from exactly the arguments that it was given; of these it takes over copies, as
FlashInfer does when it brings them to the device. Its parameters are FlashInfer's: tests/contract holds
names, order and defaults against FlashInfer's own.
"""

from __future__ import annotations

import torch


class StandIn:
    """The part of ``BatchPrefillWithPagedKVCacheWrapper`` that is used."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert float_workspace_buffer.dtype == torch.uint8
        assert float_workspace_buffer.ndim == 1
        self.workspace = float_workspace_buffer
        self.layout = kv_layout
        self.plans = []
        self.runs = []

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        *,
        causal=False,
        sm_scale=None,
        q_data_type="float16",
        kv_data_type=None,
        seq_lens=None,
    ):
        arrays = (qo_indptr, paged_kv_indptr, paged_kv_last_page_len)
        for array in (*arrays, *([] if seq_lens is None else [seq_lens])):
            assert array.dtype == torch.int32
            assert array.is_cpu, "plan() would wait for the device"
        assert paged_kv_indices.dtype == torch.int32
        batch = len(qo_indptr) - 1
        assert batch >= 1
        assert len(paged_kv_indptr) == batch + 1
        assert len(paged_kv_last_page_len) == batch
        for starts in (qo_indptr, paged_kv_indptr):
            assert starts[0] == 0
            assert (starts.diff() > 0).all()
        assert len(paged_kv_indices) == paged_kv_indptr[-1]
        assert (paged_kv_last_page_len >= 1).all()
        assert (paged_kv_last_page_len <= page_size).all()
        lens = (paged_kv_indptr.diff() - 1) * page_size + paged_kv_last_page_len
        # One of FlashInfer's two kernels goes by these lengths, the other by the pages.
        assert seq_lens is None or torch.equal(seq_lens, lens)
        assert num_qo_heads % num_kv_heads == 0
        self.starts = qo_indptr.tolist()
        self.pages = paged_kv_indices.long().split(paged_kv_indptr.diff().tolist())
        self.lens = lens.tolist()
        self.shape = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self.causal = causal
        self.scale = head_dim_qk**-0.5 if sm_scale is None else sm_scale
        self.types = (q_data_type, q_data_type if kv_data_type is None else kv_data_type)
        self.plans.append(tuple(array.tolist() for array in (*arrays, paged_kv_indices)))

    def run(self, q, paged_kv_cache, *, out=None):
        keys, values = paged_kv_cache
        num_heads, num_kv_heads, head_size, page_size = self.shape
        assert (q.dtype, keys.dtype) == self.types
        assert q.shape == (self.starts[-1], num_heads, head_size)
        assert keys.stride() == values.stride()
        assert keys.stride(-1) == q.stride(-1) == 1
        if self.layout == "NHD":
            keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        for cache in (keys, values):
            assert cache.shape[1:] == (num_kv_heads, page_size, head_size)
        out = torch.empty_like(q) if out is None else out
        assert (out.shape, out.dtype) == (q.shape, q.dtype)
        group = num_heads // num_kv_heads
        for row, (pages, length) in enumerate(zip(self.pages, self.lens, strict=True)):
            own = slice(*self.starts[row : row + 2])
            k, v = (
                cache[pages].transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(group, 0)
                for cache in (keys, values)
            )  # [Hq, length, D]
            logits = torch.einsum("qhd,hkd->hqk", q[own].double(), k.double()) * self.scale
            chunk = logits.shape[1]
            q_index, kv_index = torch.arange(chunk)[:, None], torch.arange(length)
            if self.causal:  # the rule of FlashInfer's kernels: queries end where the keys do
                logits = logits.masked_fill(kv_index + chunk > length + q_index, -torch.inf)
            result = torch.einsum("hqk,hkd->qhd", logits.softmax(-1), v.double())
            out[own] = result.to(out.dtype)
        self.runs.append((q, paged_kv_cache, out))
        return out
