"""``Scheduler._preempt_request``: pages that were not computed are not found again.

Symptom: with ``--scheduling-policy priority`` a request resumes at, or shares, a page whose last
token was never written: a wrong answer.
Why: vLLM publishes the hashes of the pages that a step will fill as it schedules the request. A
request of lower priority may then be preempted in the same step, to make room for another one; its
pages keep their hashes.
Condition: a group is of streaming heads and prefix caching is on. For all other preemptions there is
no such page.
May go: once vLLM takes back the hashes of a step that a request lost.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any


def patch(module: ModuleType) -> None:
    """Wrap the method.

    Args:
        module: ``vllm.v1.core.sched.scheduler``.
    """
    original = module.Scheduler._preempt_request

    @wraps(original)
    def _preempt_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        forget_uncomputed(self.kv_cache_manager, request)
        return original(self, request, *args, **kwargs)

    module.Scheduler._preempt_request = _preempt_request


def forget_uncomputed(kv_cache_manager: Any, request: Any) -> None:
    """Take back the hashes of a request's pages beyond its computed tokens.

    Args:
        kv_cache_manager: vLLM's ``KVCacheManager``.
        request: about to be preempted; its ``num_computed_tokens`` does not count a step that is
            still being planned.
    """
    from vllm_duo.kv_cache.snapshot_manager import SnapshotManager
    from vllm_duo.kv_cache.spec import RetrievalSpec

    managers = kv_cache_manager.coordinator.single_type_managers
    if not any(isinstance(manager, SnapshotManager) for manager in managers):
        return
    for manager in managers:
        if isinstance(manager.kv_cache_spec, RetrievalSpec):
            computed = request.num_computed_tokens // manager.block_size
            pages = manager.req_to_blocks.get(request.request_id, ())[computed:]
            lost = {page.block_id for page in pages if page.block_hash is not None}
            kv_cache_manager.block_pool.evict_blocks(lost)
