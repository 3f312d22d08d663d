"""``GPUModelRunner.may_reinitialize_input_batch``: no slot mapping for streaming groups.

Symptom: out-of-bounds reads, even a segmentation fault, once a request is longer than its ring.
Why: the V1 runner (also the CPU's) computes a position-indexed slot mapping for every group without
looking at ``uses_slot_mapping``; a ring's table is shorter than the request.
Condition: the group's spec is a ``StreamingSpec``; its slots come from the operators.
May go: once the V1 runner honours ``KVCacheSpec.uses_slot_mapping``, as V2 does.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any


def patch(module: ModuleType) -> None:
    """Wrap the method.

    Args:
        module: ``vllm.v1.worker.gpu_model_runner``.
    """
    runner = module.GPUModelRunner
    original = runner.may_reinitialize_input_batch

    @wraps(original)
    def may_reinitialize_input_batch(self: Any, kv_cache_config: Any) -> None:
        from vllm.v1.kv_cache_interface import iter_layer_specs
        from vllm.v1.worker.block_table import SlotMappingMode

        from vllm_duo.kv_cache.spec import StreamingSpec

        original(self, kv_cache_config)
        tables = self.input_batch.block_table.block_tables
        for table, group in zip(tables, kv_cache_config.kv_cache_groups, strict=False):
            specs = iter_layer_specs(group.kv_cache_spec)
            if any(isinstance(spec, StreamingSpec) for spec in specs):
                table.slot_mapping_mode = SlotMappingMode.NONE

    runner.may_reinitialize_input_batch = may_reinitialize_input_batch
