"""Full attention that the GPU benchmark compares with, called as its libraries want it."""

from __future__ import annotations

import itertools
import sys
from argparse import Namespace

import pytest
import torch

from benchmarks.gpu import baselines, gate
from benchmarks.gpu.cases import Point
from benchmarks.gpu.layer import Layer
from tests.benchmarks.gpu.toys import CPU, LLAMA_3, toy


class TestBaselines:
    def test_merged_pieces_are_the_whole(self):
        logits, values = torch.randn(5, 40, dtype=torch.float64), torch.randn(40, 8).double()

        def over(piece):
            part = logits[:, piece]
            return part.softmax(-1) @ values[piece], part.logsumexp(-1, keepdim=True)

        merged = baselines.merge(*over(slice(0, 30)), *over(slice(30, 40)))
        assert torch.allclose(merged, logits.softmax(-1) @ values)

    @pytest.mark.parametrize("chunk", [1, 70])
    @pytest.mark.parametrize("prepare", [baselines.torch_flash, baselines.torch_cudnn])
    def test_torchs_operators_take_what_we_pass(self, prepare, chunk):
        """Without their kernels: what PyTorch knows of their arguments and shapes."""
        point = Point(shape=LLAMA_3, context=700 + chunk, chunk=chunk, requests=2)

        def empty(*sizes):
            return torch.empty(*sizes, 128, device="meta", dtype=torch.bfloat16)

        keys = empty(2, 8, point.context)
        layer = Namespace(point=point, query=empty(2 * chunk, 32), dense=(keys, keys))
        assert prepare(layer)().shape == (2 * chunk, 32, 128)

    @pytest.mark.parametrize("before", [0, 14])
    def test_cudnn_is_asked_for_context_and_chunk(self, before, monkeypatch):
        """With cuDNN's causal mask, from the first key, and heads that it will not share."""
        asked = []

        def operator(query, keys, values, bias, lse, dropout, causal, debug, *, scale):
            if query.shape[1] != keys.shape[1]:
                raise RuntimeError("heads")
            asked.append((keys.shape[2], causal))
            logits = query.double() @ keys.double().transpose(2, 3) * scale
            if causal:
                logits = logits.masked_fill(~torch.ones(logits.shape[2:]).tril().bool(), -torch.inf)
            out = (logits.softmax(-1) @ values.double()).to(query.dtype)
            return out, logits.logsumexp(-1).float(), None

        monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", operator)
        layer = Layer(toy(before, 6, 1), CPU)
        output = baselines.torch_cudnn(layer)()
        assert asked == [(6, True), (14, False)][: 1 + bool(before)]
        gate.check_rows("cudnn", output, layer, 0, range(6))

    def test_flashinfer_is_planned_for_the_pages(self, monkeypatch):
        """A stand-in that attends by the plan."""
        planned = []

        class Wrapper:
            def __init__(self, workspace, layout, use_tensor_cores=None):
                assert layout == "HND"
                assert workspace.dtype == torch.uint8

            def plan(self, *plan, **types):
                planned.append((plan, types))

            def run(self, query, caches, out):
                *_, pages, blocks, last, heads, kv_heads, size, block = planned[-1][0]
                assert (heads, kv_heads, size, block) == (4, 2, 16, 4)
                for request, (begin, end) in enumerate(itertools.pairwise(pages.tolist())):
                    own = blocks[begin:end].long()
                    count = (end - begin - 1) * block + int(last[request])
                    k, v = (
                        cache[own].transpose(1, 2).flatten(0, 1)[:count].repeat_interleave(2, 1)
                        for cache in caches
                    )
                    weights = torch.einsum("hd,nhd->hn", query[request].float(), k.float()) / 4
                    out[request] = torch.einsum("hn,nhd->hd", weights.softmax(-1), v.float())
                return out

        names = ("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper")
        stand_in = Namespace(**dict.fromkeys(names, Wrapper))
        monkeypatch.setitem(sys.modules, "flashinfer", stand_in)
        monkeypatch.setattr(baselines, "WORKSPACE_BYTES", 16)
        layer = Layer(toy(20, 1), CPU)
        gate.check_rows("flashinfer", baselines.flashinfer_paged(layer)(), layer, 0, range(2))
        plan, types = planned[0]
        assert types == {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
        assert len(plan) == 7
        baselines.flashinfer_paged(Layer(toy(14, 6, 1), CPU))
        plan, types = planned[1]
        assert plan[0].tolist() == [0, 6]
        assert types["causal"] is True

    def test_vllms_flash_attention_takes_the_pages(self):
        """A stand-in that attends over them, called as the contract tests check."""

        def function(q, k, v, cu_seqlens_q, max_seqlen_q, seqused_k, **others):
            assert others["fa_version"] == 3
            assert others["causal"] is True
            assert (max_seqlen_q, others["max_seqlen_k"]) == (1, 21)
            rows = []
            for request, table in enumerate(others["block_table"].long()):
                keys, values = (
                    part[table].flatten(0, 1)[: int(seqused_k[request])].repeat_interleave(2, 1)
                    for part in (k, v)
                )
                token = q[int(cu_seqlens_q[request])].float()
                logits = torch.einsum("hd,nhd->hn", token, keys.float()) * others["softmax_scale"]
                rows.append(torch.einsum("hn,nhd->hd", logits.softmax(-1), values.float()))
            return torch.stack(rows).to(q.dtype)

        layer = Layer(toy(20, 1), CPU)
        run = baselines.vllm_flash_attention(layer, function=function, fa_version=3)
        gate.check_rows("flash", run(), layer, 0, range(2))

    def test_what_is_missing_is_said(self):
        found = list(baselines.installed(torch.device("cuda", 0)))
        missing = dict(each for each in found if isinstance(each, tuple))
        assert "FlashAttention of vLLM" in missing
        names = [each.name for each in found if isinstance(each, baselines.Baseline)]
        assert f"FlashAttention 2 of torch {torch.__version__}" in names
