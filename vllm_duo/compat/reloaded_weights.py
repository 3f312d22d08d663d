"""``EngineCore.collective_rpc``: the storage connector hears that its files are of other weights.

Symptom: after ``reload_weights`` with another checkpoint, keys of the old weights are loaded from
files, and those of the new ones are stored for the old.
Why: vLLM tells a KV connector nothing of its model.
Condition: the connector is ``DuoStorageConnector``, and the workers are asked for ``reload_weights``.
(vLLM's other way, ``--weight-transfer-config``, is refused with that connector.)
May go: once vLLM tells connectors when weights change.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

from vllm_duo.kv_transfer import is_storage

RELOADS = "reload_weights"
"""Method of vLLM's workers."""


def patch(module: ModuleType) -> None:
    """Wrap the method.

    Args:
        module: ``vllm.v1.engine.core``.
    """
    original = module.EngineCore.collective_rpc

    @wraps(original)
    def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        connector = self.scheduler.get_kv_connector() if method == RELOADS else None
        if connector is not None and is_storage(connector):
            connector.weights_changed()
        return original(self, method, *args, **kwargs)

    module.EngineCore.collective_rpc = collective_rpc
