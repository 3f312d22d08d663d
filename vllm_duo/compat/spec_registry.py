"""``KVCacheSpecRegistry``: our specs and their managers.

Symptom: "Unsupported KV cache spec type" when the engine core reads the workers' specs.
Why: the registry lives in each process; nothing of ours is imported in the engine core by then.
Condition: the module with vLLM's managers has been loaded.
May go: never; this is registration, put here so that it runs at the right time.
"""

from __future__ import annotations

from types import ModuleType


def patch(module: ModuleType) -> None:
    """Register both specs; safe to call again.

    Trap: the registry registers vLLM's own specs only while it is empty, so they must come first.

    Args:
        module: ``vllm.v1.core.single_type_kv_cache_manager``.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_duo.kv_cache.manager import RingManager
    from vllm_duo.kv_cache.spec import RetrievalSpec, StreamingSpec

    module.register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(
        RetrievalSpec, module.FullAttentionManager, uniform_type_base_spec=FullAttentionSpec
    )
    KVCacheSpecRegistry.register(StreamingSpec, RingManager, uniform_type_base_spec=StreamingSpec)
