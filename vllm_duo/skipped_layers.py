"""Layers that a quantised KV cache leaves out: vLLM's ``--kv-cache-dtype-skip-layers``.

Their caches keep the model's own dtype. No vLLM, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_duo.windows import Windows

FLAG = "--kv-cache-dtype-skip-layers"

SLIDING_LAYERS = "sliding_window"
"""vLLM's word for all layers with a sliding window of the model's own."""


def skipped_layers(names: Sequence[str], num_layers: int, windows: Windows) -> frozenset[int]:
    """The layers that are named, as vLLM reads the flag.

    Args:
        names: indices from 0 and ``sliding_window``.
        num_layers: of the model.
        windows: the model's sliding windows by layer, also those that hide nothing from a server's
            requests; empty: none.

    Raises:
        ValueError: a name is neither, which vLLM would pass over.

    Worked example: ``["3", "sliding_window"]`` and the windows (512, None, 512, None): layers 0, 2, 3.
    """
    found = set()
    for name in names:
        if name == SLIDING_LAYERS:
            found |= {layer for layer, window in enumerate(windows) if window is not None}
        elif name in map(str, range(num_layers)):
            found.add(int(name))
        else:
            raise ValueError(
                f"{FLAG}: expected layers from 0 to {num_layers - 1} or {SLIDING_LAYERS}, got "
                f"{name!r}: correct it"
            )
    return frozenset(found)
