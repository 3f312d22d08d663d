"""A pytest plugin: engines in this process run vLLM's model runner V2, on the CPU.

That runner's own kernels are Triton's. vLLM runs it on CPUs where Triton has a CPU backend; Triton's
interpreter stands in for one here. Load the plugin before vLLM (``-p tests.e2e.runner_v2``), in a
process of its own: ``test_runner_v2.py`` does.
"""

from __future__ import annotations

import importlib
import os
from types import SimpleNamespace

import pytest

from tests.e2e.engine import SETTINGS

# The interpreter is chosen when Triton is imported.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
importlib.import_module("triton.language")
# vLLM looks for the name alone.
importlib.import_module("triton.backends").backends["cpu"] = SimpleNamespace(driver=object())
SETTINGS["untested_model_runner"] = True


@pytest.fixture(autouse=True, scope="session")
def runs_v2():
    """Fail the session if that runner ran no step, or none with a snapshot."""
    import vllm.v1.worker.cpu_worker  # noqa: F401 - adapts torch before the runner is imported
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vllm_duo.compat.snapshot_orders import ATTRIBUTE

    prepare, orders = GPUModelRunner.prepare_inputs, []

    def prepare_inputs(self, scheduler_output, *args, **kwargs):
        orders.append(getattr(scheduler_output, ATTRIBUTE, []))
        return prepare(self, scheduler_output, *args, **kwargs)

    GPUModelRunner.prepare_inputs = prepare_inputs
    yield
    GPUModelRunner.prepare_inputs = prepare
    stored = {order.store for step in orders for order in step}
    assert stored == {True, False}, f"{len(orders)} steps, snapshots stored or restored: {stored}"
