"""DuoStorageConnector: prefixes of both classes of heads in files, found again after a restart.

vLLM imports this package by name (``kv_connector_module_path``) and takes the class from it.
``connector.py`` is what vLLM talks to; ``planner.py`` is its scheduler's side, ``copier.py`` its
worker's; ``store.py``, ``budget.py`` and ``writer.py`` keep the files, and know neither vLLM nor torch.
"""

from __future__ import annotations

CONNECTOR = "DuoStorageConnector"
MODULE = "vllm_duo.kv_transfer"

__all__ = ["DuoStorageConnector"]


def is_storage(connector: object) -> bool:
    """Whether a KV connector of vLLM's, or None, is this package's."""
    return type(connector).__module__ == f"{MODULE}.connector"


def __getattr__(name: str) -> object:
    """The connector on first use: the names above must cost no import of vLLM."""
    if name == CONNECTOR:
        from vllm_duo.kv_transfer.connector import DuoStorageConnector

        return DuoStorageConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
