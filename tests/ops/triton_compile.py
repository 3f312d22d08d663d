"""Compile every Triton kernel for NVIDIA GPUs, as its public function launches it; needs no GPU.

Run as a module in a process of its own, without ``TRITON_INTERPRET``: prints one JSON object a kernel
with its shared memory, registers and stack. Launches are caught, not carried out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from vllm_duo.ops import gpu
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches, PagedTable, RingTable

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def capture(launches):
    """Make Triton collect launches instead of carrying them out."""

    def run(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, args, kwargs))

    JITFunction.run = run


def compile_launch(kernel, args, kwargs, target):
    """Compile one caught launch; what is divisible by 16 is specialised, as at run time."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[name] = mangle_type(value)
        if torch.is_tensor(value) or (type(value) is int and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options=options)
    return {
        "kernel": kernel.fn.__name__,
        "arch": target.arch,
        "shared_bytes": compiled.metadata.shared,
        "copies_in_flight": copies_in_flight(compiled.asm["ttgir"]),
        **resources(compiled.asm["cubin"]),
    }


def copies_in_flight(ttgir):
    """Of each loop that waits for asynchronous copies: how many it leaves on their way at its first."""
    found = []
    for body in ttgir.split(" scf.for ")[1:]:
        body = body.split(" scf.yield ")[0]
        wait = re.search(r"ttg\.async_wait .*?num = (\d+)", body)
        if wait:
            found.append(int(wait[1]))
    return found


def resources(cubin):
    """Registers of a thread and its bytes of stack (spilled registers), from the compiled object."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        name: int(re.search(rf"{key}:(\d+)", text)[1])
        for name, key in (("registers", "REG"), ("stack_bytes", "STACK"))
    }


MULTIPROCESSOR_BYTES = {80: 164 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10}
"""Shared memory of a multiprocessor (CUDA programming guide, compute capabilities)."""

MASKS = {
    "both": [True, False, True, False],
    "retrieval": [True] * 4,
    "streaming": [False] * 4,
}


def launch_all(dtype, head_size, group, query_len, mask, sinks=False):
    """Call every operator once, for two decodes and two prefills, with learned sinks or without."""
    from vllm_duo.ops.decode import triton as decode
    from vllm_duo.ops.prefill import triton as prefill
    from vllm_duo.ops.snapshot import triton as snapshot
    from vllm_duo.ops.write_kv import triton as write_kv

    heads = HeadMap.from_mask(np.array(MASKS[mask]), torch.device("cpu"))
    table = torch.ones(4, 64, dtype=torch.int32)
    paged = PagedTable(table, 16)
    orders = torch.zeros(9, 68, dtype=torch.int32)
    ring = RingTable(table, 16, 64, 256, 256, orders=orders)

    def cache(picked):
        return torch.zeros(3, len(picked), 16, 2 * head_size, dtype=dtype) if len(picked) else None

    retrieval, streaming = cache(heads.retrieval), cache(heads.streaming)
    caches = LayerCaches(
        retrieval,
        None if retrieval is None else paged,
        streaming,
        None if streaming is None else ring,
    )
    starts = np.array([0, query_len, 2 * query_len, 2 * query_len + 40, 2 * query_len + 100])
    tokens = int(starts[-1])
    q = torch.zeros(tokens, 4 * group, head_size, dtype=dtype)
    k, v = torch.zeros(2, tokens, 4, head_size, dtype=dtype)
    batch = Batch.from_host(starts, [1000] * 4, 2)
    write_kv.write_kv(k, v, heads, caches, batch)
    snapshot.copy_snapshots(k, v, heads, caches, batch)
    step = (q, k, v, heads, caches, batch, 0.1, torch.empty_like(q))
    learned = torch.zeros(4 * group) if sinks else None
    decode.decode(*step, learned)
    prefill.prefill(*step, learned)


def main():
    for arch, dtype, head_size, group, query_len, mask, *sinks in json.loads(sys.argv[1]):
        launches = []
        capture(launches)
        gpu.shared_bytes = lambda device, arch=arch: MULTIPROCESSOR_BYTES[arch]
        launch_all(getattr(torch, dtype), head_size, group, query_len, mask, *sinks)
        for kernel, args, kwargs in launches:
            result = compile_launch(kernel, args, kwargs, GPUTarget("cuda", arch, 32))
            shape = {
                "dtype": dtype,
                "head_size": head_size,
                "group": group,
                "query": query_len,
                "mask": mask,
            }
            print(json.dumps({**shape, **result}), flush=True)


if __name__ == "__main__":
    main()
