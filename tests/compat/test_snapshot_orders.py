"""Snapshot orders find their requests' rows in either model runner's batch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_duo.attention.metadata import _copies
from vllm_duo.compat import snapshot_orders
from vllm_duo.kv_cache.orders import SnapshotOrder

ORDER = SnapshotOrder(store=True, request_id="b", bin=0, num_tokens=32, blocks=(7, 8))
CPU = torch.device("cpu")


def output(*orders):
    """A step's output, with orders where there are any."""
    found = SimpleNamespace(batch=["c", "a", "b"])
    if orders:
        setattr(found, snapshot_orders.ATTRIBUTE, list(orders))
    return found


@pytest.fixture
def runner_v1():
    class GPUModelRunner:
        def execute_model(self, scheduler_output):
            rows = {request: row for row, request in enumerate(scheduler_output.batch)}
            self.input_batch = SimpleNamespace(req_id_to_index=rows)
            return _copies(0, CPU)

    snapshot_orders.patch_runner(SimpleNamespace(GPUModelRunner=GPUModelRunner))
    return GPUModelRunner()


@pytest.fixture
def runner_v2():
    class GPUModelRunner:
        def prepare_inputs(self, scheduler_output):
            return SimpleNamespace(req_ids=scheduler_output.batch)

        def execute_model(self, scheduler_output, dummy_run=False):
            if not dummy_run:
                self.prepare_inputs(scheduler_output)
            return _copies(0, CPU)

    snapshot_orders.patch_runner_v2(SimpleNamespace(GPUModelRunner=GPUModelRunner))
    return GPUModelRunner()


@pytest.fixture(params=["v1", "v2"])
def runner(request):
    return request.getfixturevalue(f"runner_{request.param}")


def test_copies_have_the_rows_of_the_step(runner):
    (copy,) = runner.execute_model(output(ORDER))
    assert (copy.row, copy.store, copy.num_tokens) == (2, True, 32)
    assert copy.blocks.tolist() == [7, 8]
    other = output(ORDER)
    other.batch = ["b", "a"]
    (copy,) = runner.execute_model(other)
    assert copy.row == 0


def test_steps_without_orders_copy_nothing(runner):
    runner.execute_model(output(ORDER))
    assert runner.execute_model(output()) == ()
    assert _copies(0, CPU) == ()


def test_order_of_a_request_that_is_not_in_the_batch_is_an_error(runner):
    gone = output(ORDER)
    gone.batch = ["a", "c"]
    with pytest.raises(RuntimeError, match="request b, which is not in the batch"):
        runner.execute_model(gone)
    assert _copies(0, CPU) == ()


def test_batch_of_the_last_step_is_not_taken_for_this_one(runner_v2):
    """A dummy run prepares no batch, and carries no orders; were it to, it would be noticed."""
    runner_v2.execute_model(output(ORDER))
    assert runner_v2.execute_model(output(), dummy_run=True) == ()
    with pytest.raises(RuntimeError, match="not in the batch"):
        runner_v2.execute_model(output(ORDER), dummy_run=True)
