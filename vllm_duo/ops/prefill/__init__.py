"""``prefill``: attention of all requests after the batch's first ``num_decodes``."""

from __future__ import annotations

import torch

from vllm_duo.ops import cpu, gpu
from vllm_duo.ops.batch import Batch, HeadMap, LayerCaches
from vllm_duo.ops.prefill import reference
from vllm_duo.ops.validate import check_layer, check_query, check_sinks


def prefill(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    heads: HeadMap,
    caches: LayerCaches,
    batch: Batch,
    scale: float,
    output: torch.Tensor,
    sinks: torch.Tensor | None = None,
) -> None:
    """The prefills' tokens: chunks of any length, both classes in one call.

    A query at position i sees key j iff j <= i and, in a streaming head, also j < sink_size or
    j > i - recent_size. The caches hold the requests' tokens before the step; the step's own keys
    and values come as ``key`` and ``value``, so the result does not depend on the chunks.

    Args:
        query: [T, Hq, D] fp32/bf16/fp16, after RoPE; Hq a multiple of Hkv.
        key: [T, Hkv, D], after RoPE.
        value: [T, Hkv, D].
        heads: the layer's head classes.
        caches: read only.
        batch: the step's requests; this call serves all after the first ``num_decodes``.
        scale: factor on the logits, mostly D ** -0.5.
        output: [T, Hq, D], mutated in place at these requests' tokens only.
        sinks: [Hq] float32, learned logits that take part in the softmax like one more key without a
            value, unscaled (gpt-oss); None: there are none.

    Raises:
        ValueError: shapes, dtypes or devices disagree.

    Source: DuoAttention, arXiv:2410.10819, section 2.3.
    """
    if cpu.runs(key):
        cpu.run(
            cpu.ATTEND,
            query,
            key,
            value,
            heads,
            caches,
            batch,
            scale=scale,
            output=output,
            requests=(batch.num_decodes, batch.num_reqs),
            sinks=sinks,
        )
        return
    check_layer(key, value, heads, caches, batch)
    check_query(query, key, heads, output)
    check_sinks(sinks, query)
    gpu.implementation(key, reference).prefill(
        query, key, value, heads, caches, batch, scale, output, sinks
    )
