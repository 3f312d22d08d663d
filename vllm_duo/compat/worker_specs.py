"""``Executor.get_kv_cache_specs``: every worker of a server with duo runs duo.

Symptom: on CPUs a worker process in which the plugin was not loaded, or failed to load, serves with
vLLM's own attention; if no worker has it, nothing else would tell.
Why: vLLM logs a plugin that fails to load and goes on, and its CPU platform answers with its own
backend where the chosen one is not registered.
Condition: a worker of a server with duo reports a cache that is not one of duo's specs.
May go: never; this is a check, put where the engine first hears of the workers' caches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_duo.server_plan import is_duo

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec


def patch(module: ModuleType) -> None:
    """Wrap the method that all executors inherit.

    Args:
        module: ``vllm.v1.executor.abstract``.
    """
    original = module.Executor.get_kv_cache_specs

    @wraps(original)
    def get_kv_cache_specs(self: Any) -> list[dict[str, KVCacheSpec]]:
        specs = original(self)
        if is_duo(self.vllm_config):
            check_workers(specs, lambda: self.collective_rpc(make_locator()))
        return specs

    module.Executor.get_kv_cache_specs = get_kv_cache_specs


def check_workers(
    specs: Sequence[Mapping[str, KVCacheSpec]], locate: Callable[[], Sequence[str]]
) -> None:
    """Hold every worker's caches against duo's kinds.

    Args:
        specs: of each worker, by layer name.
        locate: asks where each worker runs.

    Raises:
        RuntimeError: workers have other caches; with each of them.
    """
    from vllm_duo.kv_cache.spec import RetrievalSpec, StreamingSpec

    strangers = {
        worker: sorted({type(spec).__name__ for spec in own.values()})
        for worker, own in enumerate(specs)
        if not all(isinstance(spec, (RetrievalSpec, StreamingSpec)) for spec in own.values())
    }
    if not strangers:
        return
    places = locate()
    listed = "\n".join(
        f"  - worker {worker} on {places[worker]}: {', '.join(kinds)}"
        for worker, kinds in strangers.items()
    )
    raise RuntimeError(
        "--attention-backend duo: expected duo's caches in every worker, but these run vLLM's own "
        f"attention:\n{listed}\nvllm-duo is not loaded there: install it on that machine, let "
        "VLLM_PLUGINS name duo, and look for 'Failed to load plugin duo' in that worker's log"
    )


def make_locator() -> Callable[[Any], str]:
    """A function that says where a worker runs; sent whole, since the worker may lack this package."""

    def locate(worker: Any) -> str:
        import os
        import socket

        return f"{socket.gethostname()} (process {os.getpid()})"

    return locate
