"""vllm-duo: full KV for retrieval heads, a ring of sink and recent tokens for streaming heads."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_duo.heads import HeadPattern, HeadSelection

__all__ = ["HeadPattern", "HeadSelection"]


def __getattr__(name: str) -> object:
    """Import the public names on first use, so that the plugin's entry point stays cheap."""
    if name in __all__:
        from vllm_duo import heads

        return getattr(heads, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
