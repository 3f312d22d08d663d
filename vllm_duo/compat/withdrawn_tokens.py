"""``Scheduler._preempt_request``: tokens that a step plans and takes back are not cached.

Symptom: wrong answers from prefix hits under ``--scheduling-policy priority``: the request that is
preempted may already have its next tokens planned in the same step.
Why: vLLM gives their retrieval blocks hashes when it plans them, and leaves them findable although the
step no longer computes them. (Snapshots of streaming heads are withdrawn by their own manager.) Known
upstream for its other cache types too.
Condition: a group is of streaming heads. First come, first served never preempts a planned request.
May go: once vLLM withdraws the hashes itself.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any


def patch(module: ModuleType) -> None:
    """Wrap the method.

    Args:
        module: ``vllm.v1.core.sched.scheduler``.
    """
    original = module.Scheduler._preempt_request

    def _preempt_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        forget_planned(self.kv_cache_manager, request)
        original(self, request, *args, **kwargs)

    module.Scheduler._preempt_request = _preempt_request


def forget_planned(kv_cache_manager: Any, request: Any) -> None:
    """Let nobody find the request's retrieval blocks beyond its computed tokens.

    Args:
        kv_cache_manager: vLLM's ``KVCacheManager``.
        request: vLLM's request, still holding its blocks. Its ``num_computed_tokens`` counts a step's
            tokens only once the whole step is planned.
    """
    from vllm_duo.kv_cache.manager import RingManager

    managers = kv_cache_manager.coordinator.single_type_managers
    if not any(isinstance(manager, RingManager) for manager in managers):
        return
    for manager in managers:
        if not isinstance(manager, RingManager):
            table = manager.req_to_blocks.get(request.request_id, ())
            planned = table[request.num_computed_tokens // manager.block_size :]
            manager.block_pool.evict_blocks({block.block_id for block in planned})
