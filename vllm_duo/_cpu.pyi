"""The compiled module of ``csrc/binding.cpp``; ``vllm_duo.ops.cpu`` is its only caller."""

import torch

WRITE_RETRIEVAL: int
COPY_SNAPSHOTS: int
ATTEND: int
WRITE_STREAMING: int
FLOAT32: int
BFLOAT16: int
FP8_E4M3: int
FP8_E5M2: int
SCALED_FP8_E4M3: int
SCALED_INT8: int
SCALED_INT4: int
FLOAT16: int

View = tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""Address, dtype (one of the constants above), shape and strides in elements of a tensor."""

class Heads:
    def __init__(self, retrieval: list[int], streaming: list[int]) -> None: ...

class Batch:
    def __init__(self, query_start_loc: list[int], seq_lens: list[int]) -> None: ...

class BlockTable:
    def __init__(
        self,
        blocks: torch.Tensor,
        block_size: int,
        is_ring: bool,
        sink: int,
        recent: int,
        ring: int,
    ) -> None: ...

class Copies:
    def add(self, store: bool, row: int, num_tokens: int, blocks: torch.Tensor) -> None: ...

def run(
    phases: int,
    batch: Batch,
    heads: Heads,
    query: View | None,
    key: View,
    value: View,
    output: View | None,
    scale: float,
    first: int,
    last: int,
    retrieval: View | None,
    paged: BlockTable | None,
    streaming: View | None,
    ring: BlockTable | None,
    copies: Copies | None,
    key_scale: float,
    value_scale: float,
    sinks: View | None,
    check: bool,
) -> None: ...
def isa() -> str: ...
def force_isa(name: str) -> None: ...
def supported_isas() -> list[str]: ...
def max_threads() -> int: ...
def openmp_library() -> str: ...
