"""What the compiled module answers to wrong input, and how its variants are chosen."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ops.oracle import Store
from tests.ops.test_attention import make_sequences, serve
from vllm_duo.kv_cache.formats import FORMATS
from vllm_duo.ops import cpu
from vllm_duo.ops.batch import Batch, LayerCaches, PagedTable
from vllm_duo.ops.layer import attend_and_write


@pytest.fixture
def implementation(monkeypatch):
    """One variant is enough for checks that all share."""
    monkeypatch.setattr(cpu, "use_reference", False)


def step(**changes):
    store = Store([True, False], 32, requests=1, max_tokens=40, seed=40)
    tensors = {
        "query": torch.zeros(12, 4, 32),
        "key": torch.zeros(12, 2, 32),
        "value": torch.zeros(12, 2, 32),
        "output": torch.zeros(12, 4, 32),
        "caches": store.caches,
        "sinks": None,
        **changes,
    }
    batch = Batch.from_host(np.array([0, 12]), np.array([12]), 0)
    attend_and_write(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        store.heads,
        tensors["caches"],
        batch,
        1.0,
        tensors["output"],
        sinks=tensors["sinks"],
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.zeros(11, 2, 32), "value": torch.zeros(11, 2, 32)}, "key has 11 tokens"),
        ({"value": torch.zeros(12, 2, 16)}, "key and value must be"),
        ({"value": torch.zeros(11, 2, 32)}, "key and value must be"),
        ({"query": torch.zeros(12, 3, 32)}, "query has 3 heads, not a multiple of 2"),
        (
            {"key": torch.zeros(12, 2, 24), "value": torch.zeros(12, 2, 24)},
            "a multiple of 16 up to 512 .* got 24",
        ),
        (
            {"key": torch.zeros(12, 2, 528), "value": torch.zeros(12, 2, 528)},
            "a multiple of 16 up to 512 .* got 528",
        ),
        ({"query": torch.zeros(11, 4, 32)}, r"query must be \[T, Hq, D\] for key \[12, 2, 32\]"),
        ({"output": torch.zeros(12, 4, 32).bfloat16()}, "output and query must have one shape"),
        ({"output": torch.zeros(11, 4, 32)}, "output and query must have one shape"),
        ({"output": torch.zeros(12, 2, 32)}, "output and query must have one shape"),
        ({"query": torch.zeros(12, 4, 64)[..., ::2]}, "query must be .* contiguous last dim"),
        ({"query": torch.zeros(12, 4, 32, 1, 1)}, "of up to 4 dimensions"),
        ({"output": torch.zeros(12, 4, 32, device="meta")}, "output must be .* got .* on meta"),
        ({"caches": LayerCaches()}, "1 retrieval heads and no retrieval cache"),
        (
            {"sinks": torch.zeros(2)},
            r"sinks must be \[4\] float32, one of each query head, got \[2\]",
        ),
        ({"sinks": torch.zeros(4).bfloat16()}, "sinks must be .* float32"),
        ({"sinks": torch.zeros(8)[::2]}, "sinks must be .* float32"),
        ({"sinks": torch.zeros(4, 1)}, r"sinks must be .* got \[4, 1\]"),
        (
            {"key": torch.zeros(12, 2, 32).double(), "value": torch.zeros(12, 2, 32).double()},
            "VLLM_DUO_OPS=reference",
        ),
    ],
)
def test_wrong_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        step(**changes)


def test_narrow_table_is_named():
    store = Store([True, False], 32, requests=1, max_tokens=40, seed=41)
    paged = PagedTable(store.paged.block_table[:, :0], 16)
    caches = LayerCaches(store.caches.retrieval, paged, store.caches.streaming, store.ring)
    with pytest.raises(ValueError, match="retrieval block table has 0 columns, request 0 needs 1"):
        step(caches=caches)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda cache: cache.repeat(1, 2, 1, 1),
        lambda cache: cache[:, :, :-1],
        lambda cache: cache[..., :-16],
        lambda cache: cache.repeat_interleave(2, -1)[..., ::2],
        lambda cache: cache.bfloat16(),
    ],
    ids=["heads", "block size", "row", "stride", "dtype"],
)
@pytest.mark.parametrize("name", ["retrieval", "streaming"])
def test_wrong_cache_is_named(name, wrong):
    caches = Store([True, False], 32, requests=1, max_tokens=40, seed=45).caches
    caches = dataclasses.replace(caches, **{name: wrong(getattr(caches, name))})
    with pytest.raises(
        ValueError, match=rf"{name} cache must be \[N, 1, (16|8), 64\] of the key's"
    ):
        step(caches=caches)


def test_unknown_variant_lists_the_known_ones():
    with pytest.raises(RuntimeError, match="unknown: use one of portable"):
        cpu.force_isa("mmx")


def test_variant_is_the_fastest_of_the_processor():
    """By the operating system's list of instructions: docs/cpu.md says where each was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    told = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    flags, is_amd = told["flags"].split(), told["vendor_id"].strip() == "AuthenticAMD"
    if "amx_bf16" in cpu.supported_isas():  # flags do not say whether the process may use them
        expected = "amx_bf16"
    elif is_amd and "avx512_bf16" in flags:
        expected = "avx512_bf16"
    elif {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= {*flags}:
        expected = "avx512"
    else:
        expected = "avx2" if {"avx2", "fma", "f16c"} <= {*flags} else "portable"
    environment = {**os.environ, "VLLM_DUO_CPU_ISA": ""}
    code = "from vllm_duo.ops import cpu; print(cpu.isa())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == expected


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_result_does_not_depend_on_threads(threads):
    generator = torch.Generator().manual_seed(43)
    store = Store([True, False], 64, requests=1, max_tokens=5000, seed=44)
    store.caches.retrieval.copy_(torch.randn(store.caches.retrieval.shape, generator=generator))
    store.caches.streaming.copy_(torch.randn(store.caches.streaming.shape, generator=generator))
    q, k, v = (torch.randn(1, heads, 64, generator=generator) for heads in (8, 2, 2))
    batch = Batch.from_host(np.array([0, 1]), np.array([5000]), 1)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            output = torch.full_like(q, torch.nan)
            attend_and_write(q, k, v, store.heads, store.caches, batch, 0.125, output)
            results.append(output)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def served_by(threads, form=None):
    """Outputs and caches, as bytes, of steps that are large enough to be shared by three threads."""
    before = torch.get_num_threads()
    mask = [True, False] * 2
    store = Store(mask, 64, requests=2, max_tokens=700, recent_size=300, seed=48, form=form)
    sequences = make_sequences([700, 611], 4, 1, 64, torch.float32, seed=49)
    chunks = iter([600, 600, 0, 1, 100, 10])
    try:
        torch.set_num_threads(threads)
        serve(store, sequences, lambda left: next(chunks), 0.125, decode_up_to=8)
    finally:
        torch.set_num_threads(before)
    outputs = [torch.cat(s.outputs) for s in sequences]
    caches = [store.caches.retrieval, store.caches.streaming]
    return [tensor.contiguous().view(torch.uint8) for tensor in (*outputs, *caches)]


def assert_threads_share_all():
    for form in (None, FORMATS["int8_per_token_head"]):
        # Three threads first: what they leave out must not be there from the other run.
        for several, one in zip(served_by(3, form), served_by(1, form), strict=True):
            assert torch.equal(several, one)


def test_threads_share_writes_and_prefills():
    assert_threads_share_all()


def test_a_runtime_may_grant_fewer_threads():
    """What the missing ones were to do is done by the others."""
    code = "from tests.ops.test_cpu import assert_threads_share_all as check; check()"
    environment = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_environment_forces_a_variant():
    command = [sys.executable, "-c", "from vllm_duo.ops import cpu; print(cpu.describe())"]
    environment = {**os.environ, "VLLM_DUO_CPU_ISA": "portable"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("CPU kernels portable, ")
