"""Every vLLM symbol that the package leans on: a new vLLM release fails here first, and by name."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import vllm

from tests.contract.checks import find
from tests.contract.symbols import BACKEND, COORDINATOR, INTERFACE, MANAGERS, SYMBOLS
from vllm_duo.attention.backend import DuoAttentionBackend
from vllm_duo.attention.impl import DuoAttentionImpl
from vllm_duo.attention.metadata import DuoMetadataBuilder
from vllm_duo.attention.sibling_cache import SiblingCache
from vllm_duo.kv_cache.coordinator import SteadyCoordinator
from vllm_duo.kv_cache.manager import RingManager
from vllm_duo.kv_cache.snapshot_manager import SnapshotManager
from vllm_duo.kv_cache.spec import RetrievalSpec, StreamingSpec
from vllm_duo.metrics import DuoStatLogger
from vllm_duo.ops.prefill import flash

VAR_KEYWORD = inspect.Parameter.VAR_KEYWORD
LINES = [(file, *line) for file, lines in SYMBOLS.items() for line in lines]
IDS = [f"{file}-{symbol}" for file, symbol, _ in LINES]


@pytest.mark.parametrize(("file", "symbol", "check"), LINES, ids=IDS)
def test_symbol(file, symbol, check):
    try:
        found = find(symbol)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{symbol} is gone, vllm_duo/{file} uses it: {error}")
    problem = check(found) if check else None
    assert problem is None, f"{symbol} {problem}, vllm_duo/{file} relies on it"


def test_flash_attention_takes_what_we_pass():
    """Read, not imported: its module imports on a GPU alone."""
    path = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    functions = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    (function,) = [each for each in functions if each.name == "flash_attn_varlen_func"]
    accepted = {each.arg for each in (*function.args.args, *function.args.kwonlyargs)}
    passed = set(re.findall(r"^        (\w+)=", inspect.getsource(flash.retrieval_prefill), re.M))
    assert len(passed) == 11
    assert passed <= accepted


# Classes that vLLM calls: its base class must be all there, and call us as we expect to be called.
OVERRIDES = [
    ("kv_cache/manager.py", f"{MANAGERS}:SingleTypeKVCacheManager", RingManager),
    (
        "kv_cache/snapshot_manager.py",
        f"{MANAGERS}:SingleTypeKVCacheManager",
        SnapshotManager,
    ),
    ("kv_cache/spec.py", f"{INTERFACE}:FullAttentionSpec", RetrievalSpec),
    ("kv_cache/spec.py", f"{INTERFACE}:AttentionSpec", StreamingSpec),
    ("attention/backend.py", f"{BACKEND}:AttentionBackend", DuoAttentionBackend),
    ("attention/impl.py", f"{BACKEND}:AttentionImpl", DuoAttentionImpl),
    ("attention/metadata.py", f"{BACKEND}:AttentionMetadataBuilder", DuoMetadataBuilder),
    (
        "attention/sibling_cache.py",
        "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase",
        SiblingCache,
    ),
    ("metrics.py", "vllm.v1.metrics.loggers:StatLoggerBase", DuoStatLogger),
]
# Constructors that do not take what the base class's takes.
OWN = {
    "RingManager": {"__init__", "__new__"},
    "SnapshotManager": {"__init__"},
    "SiblingCache": {"__init__"},
    # Python's own hook, not vLLM's.
    "DuoAttentionBackend": {"__init_subclass__"},
}
# What vLLM's models hand to the backends that have it, by name: no base class tells of it.
BY_NAME = {"DuoAttentionImpl": {"sinks"}}


@pytest.mark.parametrize(("file", "symbol", "ours"), OVERRIDES, ids=[o[1] for o in OVERRIDES])
def test_nothing_abstract_is_left(file, symbol, ours):
    left = sorted(getattr(ours, "__abstractmethods__", ()))
    assert issubclass(ours, find(symbol)), f"vllm_duo/{file} no longer derives from {symbol}"
    assert not left, f"{symbol} has new abstract methods {left}: implement them in vllm_duo/{file}"


# Goes before one of vLLM's coordinators, so it is not whole by itself.
PARTS = [*OVERRIDES, ("kv_cache/coordinator.py", COORDINATOR, SteadyCoordinator)]


@pytest.mark.parametrize(("file", "symbol", "ours"), PARTS, ids=[part[1] for part in PARTS])
def test_overrides_take_what_vllm_passes(file, symbol, ours):
    base, differ = find(symbol), []
    for name, method in vars(ours).items():
        function = getattr(method, "__func__", method)
        theirs = getattr(base, name, None)
        generated = "__dataclass_fields__" in vars(ours) and name.startswith("__")
        if not inspect.isfunction(function) or theirs is None or generated:
            continue
        if name in OWN.get(ours.__name__, ()):
            continue
        passed = list(inspect.signature(theirs).parameters)
        taken = inspect.signature(getattr(ours, name)).parameters.values()
        named = [parameter.name for parameter in taken if parameter.kind is not VAR_KEYWORD]
        if name == "__init__":
            named = [each for each in named if each not in BY_NAME.get(ours.__name__, ())]
        if named != passed:
            differ.append(f"{name}: vLLM passes {passed}, ours takes {named}")
    assert not differ, f"{symbol} changed, see vllm_duo/{file}: {differ}"
