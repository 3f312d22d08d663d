"""What a loaded layer says of its KV cache, held against what was planned and what the kernels do."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vllm_duo.kv_cache.formats import FORMATS

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention

OTHERWISE = "serve this model with vLLM's own attention backend, or name another --kv-cache-dtype"


def check_format(name: str, layer: Attention, planned: str) -> None:
    """Hold a layer's own cache dtype against the planned one.

    Args:
        name: the layer's.
        layer: built, so that vLLM has chosen its cache.
        planned: vLLM's name; "auto" of a layer that is skipped.

    Raises:
        NotImplementedError: the model's code builds this layer with another kind of cache.
    """
    if FORMATS.get(layer.kv_cache_dtype) != FORMATS.get(planned):
        raise NotImplementedError(
            f"--attention-backend duo: layer {name} has a KV cache of {layer.kv_cache_dtype}, expected "
            f"{planned} by --kv-cache-dtype, the layers that are skipped and the checkpoint's "
            "quantization_config: serve this model with vLLM's own attention backend"
        )


def check_scales(name: str, layer: Attention) -> None:
    """Check the scales of a layer's cache once its weights have loaded.

    Kernels take one scale of the layer's keys and one of its values from here on (``_k_scale_float``,
    ``_v_scale_float``), and compute with queries and probabilities as they are. Where tokens have
    scales of their own, or the cache is not quantised, those of the checkpoint are not in use.

    Raises:
        NotImplementedError: scales of each head, of queries or of probabilities.
        ValueError: a scale that nothing can be divided by.
    """
    form = FORMATS.get(layer.kv_cache_dtype)
    if form is None or form.token_scales:
        return
    counts = {"keys": layer._k_scale.numel(), "values": layer._v_scale.numel()}
    for kind, count in counts.items():
        if count != 1:
            raise NotImplementedError(
                f"--attention-backend duo: layer {name} has {count} scales of its {kind}, one of each "
                f"head, expected one: {OTHERWISE}"
            )
    for kind, scale in (("keys", layer._k_scale_float), ("values", layer._v_scale_float)):
        if not (0 < scale < math.inf):
            raise ValueError(
                f"layer {name} has a scale of {scale} of its {kind}, expected more than 0 and finite: "
                "the checkpoint is damaged, or it was not loaded (--load-format dummy)"
            )
    others = {"queries": layer._q_scale_float, "probabilities": float(layer._prob_scale)}
    for kind, scale in others.items():
        if scale != 1.0:
            raise NotImplementedError(
                f"--attention-backend duo: layer {name} brings a scale of its {kind} ({scale:g}), "
                f"which duo's kernels do not quantise: {OTHERWISE}"
            )
