"""``Scheduler.schedule``, ``GPUModelRunner.execute_model``: snapshot orders go with their step.

Symptom: the worker would not know which snapshots to store and restore in a step.
Why: vLLM's own channel, ``kv_cache_block_copies``, copies whole blocks before the forward pass; a
snapshot holds tokens of the step itself, and may be restored in the step that stores it.
Condition: a group is of streaming heads and prefix caching is on; other servers' steps carry nothing.
The orders are an attribute of the ``SchedulerOutput``, which is pickled with it.
May go: once a KV cache manager can hand data of its own to the worker.
"""

from __future__ import annotations

from functools import partial, wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_duo.kv_transfer import is_storage

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_duo.kv_cache.orders import SnapshotOrder

ATTRIBUTE = "duo_snapshot_orders"
BATCH = "duo_batch_request_ids"
"""Attribute of a model runner V2: the requests of the step's batch, in its order."""


def patch_scheduler(module: ModuleType) -> None:
    """Attach a step's orders to its output.

    Args:
        module: ``vllm.v1.core.sched.scheduler``.
    """
    original = module.Scheduler.schedule

    @wraps(original)
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        orders = take_orders(self.kv_cache_manager)
        if orders:
            setattr(output, ATTRIBUTE, orders)
        if is_storage(self.connector):
            # vLLM asks its connector before the last snapshots of the step are known.
            self.connector.plan_saves(output, self.requests, orders)
        return output

    module.Scheduler.schedule = schedule


def take_orders(kv_cache_manager: Any) -> list[SnapshotOrder]:
    """The orders of the step just planned, of all bins.

    Args:
        kv_cache_manager: vLLM's ``KVCacheManager``.
    """
    from vllm_duo.kv_cache.snapshot_manager import SnapshotManager

    managers = [
        manager
        for manager in kv_cache_manager.coordinator.single_type_managers
        if isinstance(manager, SnapshotManager)
    ]
    # All bins first: no bin may be given blocks that another one's orders of this step name.
    for manager in managers:
        manager.store_late()
    return [order for manager in managers for order in manager.take_orders()]


def patch_runner(module: ModuleType) -> None:
    """Show a step's orders to the metadata builders.

    Args:
        module: ``vllm.v1.worker.gpu_model_runner``.
    """
    _show_orders(module.GPUModelRunner, lambda runner: runner.input_batch.req_id_to_index)


def patch_runner_v2(module: ModuleType) -> None:
    """The same for the model runner V2, which sorts each step's batch anew.

    Its ``prepare_inputs`` makes the batch and comes before the metadata of the same step.

    Args:
        module: ``vllm.v1.worker.gpu.model_runner``.
    """
    prepare = module.GPUModelRunner.prepare_inputs

    @wraps(prepare)
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = prepare(self, *args, **kwargs)
        setattr(self, BATCH, batch.req_ids)
        return batch

    def rows_of(runner: Any) -> dict[str, int]:
        return {request_id: row for row, request_id in enumerate(getattr(runner, BATCH))}

    def forget_last_batch(runner: Any) -> None:
        setattr(runner, BATCH, ())

    module.GPUModelRunner.prepare_inputs = prepare_inputs
    _show_orders(module.GPUModelRunner, rows_of, before=forget_last_batch)


def _show_orders(
    runner_class: Any,
    rows_of: Callable[[Any], dict[str, int]],
    before: Callable[[Any], None] = lambda runner: None,
) -> None:
    """Let the metadata builders see a step's orders while ``execute_model`` runs.

    Args:
        runner_class: vLLM's.
        rows_of: the step's rows by request id, of a runner that has them.
        before: called with the runner before a step with orders.
    """
    original = runner_class.execute_model

    @wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        orders = getattr(scheduler_output, ATTRIBUTE, None)
        if not orders:
            return original(self, scheduler_output, *args, **kwargs)
        from vllm_duo.attention.metadata import step_orders

        before(self)
        with step_orders(orders, partial(rows_of, self)):
            return original(self, scheduler_output, *args, **kwargs)

    runner_class.execute_model = execute_model
