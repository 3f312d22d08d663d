"""The Triton kernels in Triton's interpreter, which takes some hundred microseconds an operation."""

from __future__ import annotations

import dataclasses

import pytest
import triton
from triton.runtime import interpreter

from tests.conftest import HAS_DEVICE

if HAS_DEVICE:
    pytest.skip(
        "these cases run the kernels in Triton's interpreter, for machines without a GPU; here "
        "test_gpu_kernels.py runs them on the device",
        allow_module_level=True,
    )

with triton.knobs.runtime.scope():
    triton.knobs.runtime.interpret = True
    from vllm_duo.ops.decode import triton as decode_kernel
    from vllm_duo.ops.prefill import triton as prefill_kernel
    from vllm_duo.ops.snapshot import triton as snapshot_kernel
    from vllm_duo.ops.write_kv import triton as write_kernel

assert decode_kernel.fold_slots.__class__ is interpreter.InterpretedFunction

__all__ = ["decode_kernel", "prefill_kernel", "snapshot_kernel", "write_kernel"]


@pytest.fixture(autouse=True)
def implementation(monkeypatch):
    """Interpret, and faster than the interpreter does by itself.

    Triton 3.9 patches its language anew in every call of a device function: once a launch is enough.
    Its checks for int32 overflow triple the operations: `checked` turns them on where they matter.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    patch_lang = interpreter._patch_lang
    patched = set()

    class Scope:
        def __init__(self, scope):
            self.scope = scope

        def restore(self):
            patched.clear()
            self.scope.restore()

    def patch_once(function):
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return Scope(patch_lang(function))

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    options = interpreter.interpreter_builder.options
    quick = dataclasses.replace(options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", quick)
    return "triton"


@pytest.fixture
def checked(implementation, monkeypatch):
    """Let the interpreter check int32 arithmetic for overflow."""
    options = interpreter.interpreter_builder.options
    checking = dataclasses.replace(options, sanitize_overflow=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", checking)
