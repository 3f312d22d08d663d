"""A model's own sliding windows: which layers have one, and whether it hides anything.

A query at position ``i`` of a layer with a window of ``w`` tokens sees the keys ``i - w < j <= i``, as
vLLM and transformers have it: the query's own token is one of the ``w``. No vLLM, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

Windows = tuple[int | None, ...]
"""Per layer the tokens of its window, or None; empty: no layer has one."""

UNKNOWN = "the model's own sliding windows: their sizes are not known for every layer"
"""Why a model is refused whose config does not tell."""

SLIDING = "sliding_attention"
"""transformers' word for such a layer in a config's ``layer_types``."""


def layer_windows(
    num_layers: int, window: object, layer_types: Sequence[str] | None
) -> Windows | None:
    """The windows of a model's layers, as vLLM reads its config; None if these keys do not tell.

    Args:
        num_layers: of the model.
        window: ``sliding_window``; None or 0: none.
        layer_types: kind of each layer; None: all alike.

    Worked example: 4 layers, 512 tokens in all but every second one: (512, None, 512, None).
    """
    kinds = [SLIDING] * num_layers if layer_types is None else list(layer_types[:num_layers])
    if not window or SLIDING not in kinds:
        return ()
    if not isinstance(window, int) or len(kinds) < num_layers:
        return None
    return tuple(window if kind == SLIDING else None for kind in kinds)


def in_force(windows: Windows, longest: float) -> Windows:
    """The same without windows that hide nothing from a request of ``longest`` tokens.

    Worked example: a window of 4,096 tokens in a server of requests of at most 4,096: the last query,
    at position 4,095, sees position 0.
    """
    own = tuple(None if window is None or window >= longest else window for window in windows)
    return own if any(window is not None for window in own) else ()


def chosen_layers(windows: Windows) -> list[int] | None:
    """The layers whose heads a pattern chooses, those without a window; None without windows: all.

    Worked example: (512, None, 512, None) leaves layers 1 and 3.
    """
    if not windows:
        return None
    return [layer for layer, window in enumerate(windows) if window is None]


def slides_throughout(windows: Windows) -> bool:
    """Whether every layer has a window."""
    return bool(windows) and None not in windows


def describe(windows: Windows) -> str:
    """One phrase for logs and errors; empty without windows.

    Worked example: (512, None, 512, None) is "2 of 4 layers slide over 512 tokens".
    """
    sizes = sorted({window for window in windows if window is not None})
    if not sizes:
        return ""
    number = sum(window is not None for window in windows)
    listed = " or ".join(map(str, sizes))
    return f"{number} of {len(windows)} layers slide over {listed} tokens"
