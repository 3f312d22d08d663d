"""``get_kv_cache_groups``: the groups that our layout planned, not vLLM's own.

Symptom: vLLM splits or merges the layers of a pattern into other groups than planned (layers of
equal pages become many groups, "balanced" mixes of widths are cut up), which multiplies the blocks
that a request holds.
Why: ``_get_packed_kv_cache_groups`` looks for the repeating layer patterns of hybrid models.
Condition: at least one layer has a ``StreamingSpec``, or a draft model or an EAGLE head shares the pool
with duo's layers, which vLLM expects in one group with them; every other model takes vLLM's way.
May go: once a spec can name its group.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec


def module_name() -> str:
    """Where the installed vLLM keeps the function: vLLM 0.33 moved it."""
    import vllm
    from packaging.version import Version

    old = Version(vllm.__version__).release < (0, 33)
    return "vllm.v1.core.kv_cache_utils" if old else "vllm.v1.core.kv_cache_planning"


def patch(module: ModuleType) -> None:
    """Wrap ``get_kv_cache_groups``.

    Args:
        module: the one that ``module_name`` names.
    """
    original = module.get_kv_cache_groups

    @wraps(original)
    def get_kv_cache_groups(
        vllm_config: VllmConfig, kv_cache_spec: dict[str, KVCacheSpec]
    ) -> list[KVCacheGroupSpec]:
        if is_planned(vllm_config, kv_cache_spec):
            return planned_groups(kv_cache_spec)
        return original(vllm_config, kv_cache_spec)

    setattr(module, original.__name__, get_kv_cache_groups)


def is_planned(vllm_config: VllmConfig, kv_cache_spec: dict[str, KVCacheSpec]) -> bool:
    """Whether the layers' groups are ours to form."""
    from vllm_duo.drafts import draft_model_of
    from vllm_duo.kv_cache.spec import RetrievalSpec, StreamingSpec

    drafted = draft_model_of(vllm_config) is not None
    ours = (StreamingSpec, RetrievalSpec) if drafted else StreamingSpec
    return any(isinstance(spec, ours) for spec in kv_cache_spec.values())


def planned_groups(kv_cache_spec: dict[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
    """One group of all retrieval caches and of what drafts, then one per bin of streaming caches.

    Args:
        kv_cache_spec: spec of each cache, by layer name.

    Raises:
        NotImplementedError: a layer of another kind is among them.
    """
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec, UniformTypeKVCacheSpecs

    from vllm_duo.kv_cache.spec import RetrievalSpec, StreamingSpec

    retrieval: dict[str, KVCacheSpec] = {}
    bins: dict[int, dict[str, KVCacheSpec]] = {}
    for name, spec in kv_cache_spec.items():
        if isinstance(spec, StreamingSpec):
            bins.setdefault(spec.bin, {})[name] = spec
        elif isinstance(spec, RetrievalSpec):
            retrieval[name] = spec
        else:
            raise NotImplementedError(
                f"layer {name} keeps a {type(spec).__name__}, which cannot share a pool with duo's "
                "caches: serve this model with vLLM's own attention backend"
            )
    groups = []
    for specs in ([retrieval] if retrieval else []) + [bins[index] for index in sorted(bins)]:
        uniform = UniformTypeKVCacheSpecs.from_specs(specs)
        assert uniform is not None, "one class's specs are of one type"
        groups.append(KVCacheGroupSpec(list(specs), uniform))
    return groups
