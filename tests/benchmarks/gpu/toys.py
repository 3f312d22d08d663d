"""Points at sizes for Triton's interpreter, and what is compared at them."""

from __future__ import annotations

import torch

from benchmarks.gpu import baselines
from benchmarks.gpu.cases import MODELS, Limits, Point, Shape
from benchmarks.gpu.retrieval_kernels import Kernel
from tests.ops.flashinfer_stand_in import StandIn
from vllm_duo.ops.prefill.flashinfer import FlashInferPrefill

LLAMA_3, LLAMA_2 = MODELS["Llama-3-8B"], MODELS["Llama-2-7B"]
TOY = Shape(
    name="toy",
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    block_size=4,
    sink_size=3,
    recent_size=9,
)
CPU = torch.device("cpu")
LIMITS = Limits(copy_gb_s=1000.0, gemm_tflop_s=10.0)
PLAIN = baselines.Baseline("plain", baselines.plain, is_dense=True)
STAND_IN = Kernel("stand-in", lambda: FlashInferPrefill(StandIn))


def toy(before: int, chunk: int, requests: int = 2, sparsities=(0.0, 0.5, 1.0)) -> Point:
    return Point(
        shape=TOY, context=before + chunk, chunk=chunk, requests=requests, sparsities=sparsities
    )


def few(shapes):
    return iter([toy(20, 1), toy(14, 6, 1)])
