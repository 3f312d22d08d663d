"""What we ask of FlashInfer, held against its sources: they are read, since importing them needs a GPU.

They are those of the installed package, or of the wheel or folder that ``VLLM_DUO_FLASHINFER`` names.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.ops.flashinfer_stand_in import StandIn
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches, PagedTable
from vllm_duo.ops.prefill.flashinfer import FlashInferPrefill

VARIABLE = "VLLM_DUO_FLASHINFER"
WRAPPER = "BatchPrefillWithPagedKVCacheWrapper"
# What we leave to FlashInfer's defaults.
DEFAULTS = {
    "__init__": {"use_cuda_graph": False, "backend": "auto"},
    "plan": {
        "custom_mask": None,
        "packed_custom_mask": None,
        "pos_encoding_mode": "NONE",
        "use_fp16_qk_reduction": False,
        "window_left": -1,
        "logits_soft_cap": None,
        "o_data_type": None,
        "non_blocking": True,
        "max_sequence_kv": None,
        "disable_split_kv": False,
    },
    "run": {"k_scale": None, "v_scale": None, "return_lse": False, "sinks": None},
}


def read(name: str) -> str:
    """One of FlashInfer's files; skips where there is no FlashInfer."""
    given = os.environ.get(VARIABLE)
    if given and given.endswith(".whl"):
        with zipfile.ZipFile(given) as wheel:
            return wheel.read(f"flashinfer/{name}").decode()
    if given:
        return (Path(given) / "flashinfer" / name).read_text()
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or spec.origin is None:
        pytest.skip(
            "FlashInfer is not installed: name a wheel of flashinfer-python, or the folder that holds "
            f"the package, by {VARIABLE}=..."
        )
    return (Path(spec.origin).parent / name).read_text()


@pytest.fixture(scope="module")
def signatures():
    """FlashInfer's own ``__init__``, ``plan`` and ``run``, without annotations."""
    tree = ast.parse(read("prefill.py"))
    (wrapper,) = (
        node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == WRAPPER
    )
    found = {}
    for node in wrapper.body:  # of overloads the last is the function itself
        if isinstance(node, ast.FunctionDef) and node.name in DEFAULTS:
            for each in ast.walk(node.args):
                if isinstance(each, ast.arg):
                    each.annotation = None
            names: dict = {}
            exec(f"def function({ast.unparse(node.args)}): ...", names)
            found[node.name] = inspect.signature(names["function"])
    return found


@pytest.fixture(scope="module")
def calls():
    """How we call it: arguments by method, from a prefill of one token."""
    made = {}

    class Recorder(StandIn):
        def __init__(self, *args, **kwargs):
            made["__init__"] = (args, kwargs)
            super().__init__(*args, **kwargs)

        def plan(self, *args, **kwargs):
            made["plan"] = (args, kwargs)
            super().plan(*args, **kwargs)

        def run(self, *args, **kwargs):
            made["run"] = (args, kwargs)
            return super().run(*args, **kwargs)

    rows = torch.zeros(1, 2, 64, dtype=torch.bfloat16)
    caches = LayerCaches(
        torch.zeros(2, 1, 16, 128, dtype=torch.bfloat16),
        PagedTable(torch.ones(1, 1, dtype=torch.int32), 16),
    )
    heads = HeadMap.from_mask(np.ones(1, dtype=np.bool_), torch.device("cpu"))
    FlashInferPrefill(Recorder)(
        rows, heads, caches, Batch.from_host([0, 1], [1], 0), 0.1, torch.empty_like(rows)
    )
    return made


@pytest.mark.parametrize("method", DEFAULTS)
def test_takes_what_we_pass(method, signatures, calls):
    args, kwargs = calls[method]
    signatures[method].bind(None, *args, **kwargs)


@pytest.mark.parametrize("method", DEFAULTS)
def test_defaults_are_those_that_we_rely_on(method, signatures):
    parameters = signatures[method].parameters
    assert {name: parameters[name].default for name in DEFAULTS[method]} == DEFAULTS[method]


@pytest.mark.parametrize("method", DEFAULTS)
def test_the_stand_in_has_flashinfers_parameters(method, signatures):
    """Names, places and defaults, so that a wrong call fails the operators' tests too."""
    theirs = signatures[method].parameters
    for place, (name, own) in enumerate(
        inspect.signature(getattr(StandIn, method)).parameters.items()
    ):
        assert name in theirs
        assert own.default == theirs[name].default
        if own.kind is own.POSITIONAL_OR_KEYWORD:
            assert list(theirs)[place] == name


def test_the_package_has_it():
    assert WRAPPER in read("__init__.py")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        # Queries end where the keys do.
        ("attention/prefill.cuh", "kv_idx + qo_len > kv_len + q_idx"),
        # Lengths by pages, and distances of blocks in 32 bits.
        ("page.cuh", "(indptr[batch_idx + 1] - indptr[batch_idx] - 1) * page_size"),
        ("page.cuh", "uint32_t stride_page;"),
        # How far a long context is split, which sizes the workspace.
        ("attention/scheduler.cuh", "int num_blocks_per_sm = 2;"),
        ("attention/scheduler.cuh", "max_batch_size_if_split = max_grid_size / num_kv_heads;"),
    ],
)
def test_kernels_keep_to_the_rule(file, line):
    assert line in read(f"data/include/flashinfer/{file}")
