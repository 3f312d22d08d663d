r"""On the fly: how much a head's output changes when it streams, on a few dozen samples.

Source: the idea of scoring DuoAttention heads without training is that of NVIDIA's kvpress
(`DuoAttentionPress(on_the_fly_scoring=True)`), which looks at attention weights of averaged queries
and keys. No paper defines it; here the outputs themselves are compared.

With o_full and o_streaming [n, D] the outputs of a query head at the n positions where answer tokens
are predicted, every head reading the same, full model,

    score = sum |o_full - o_streaming|^2 / (2 * sum (|o_full|^2 + |o_streaming|^2)),  [L, Hq] in [0, 1].

Learned sinks take part in both outputs. The sums run over the positions of a sample; scores are
averaged over the samples. KV heads: `gqa`, max or mean over the group's query heads. What the output is
used for is not looked at: a head whose output changes much and matters little scores high. `gates`
tells these apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_duo.identify.attention import Softmax, attention_rows, full_attention
from vllm_duo.identify.methods import Floats, Job, Scores, by_layer, to_kv_heads


class OnTheFly:
    """See the module."""

    name = "on-the-fly"
    default_samples = 32

    @torch.no_grad()
    def score(self, job: Job, index: int) -> Floats:
        """[L, Hq] of one sample."""
        sample = job.samples().make("identify", index)
        ids = torch.tensor([sample.ids], device=job.model.device)
        rows = torch.tensor(sample.answer_queries(), device=job.model.device)
        found: dict[int, Tensor] = {}

        def look(layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
            full = attention_rows(query, key, softmax, rows)
            streaming = attention_rows(query, key, softmax, rows, job.rule)
            found[layer] = output_change(full, streaming, value)
            return full_attention(query, key, value, softmax)

        job.model.hidden(ids, look)
        return by_layer(found, job.model.info.num_layers).double().cpu().numpy()

    def combine(self, job: Job, scores: Floats) -> Scores:
        """Mean over the samples, then over or among the query heads of a group."""
        mean = scores.mean(axis=0)
        values = to_kv_heads(mean, job.model.info.num_kv_heads, job.settings.gqa)
        return Scores(values, {}, {"output_change": mean})


def output_change(full: Tensor, streaming: Tensor, value: Tensor) -> Tensor:
    """Score of each query head: [Hq].

    Args:
        full: [Hq, n, T] attention weights of n queries.
        streaming: [Hq, n, T] their weights under the rule.
        value: [1, Hkv, T, D].
    """
    group = full.shape[0] // value.shape[1]
    values = value[0].float().repeat_interleave(group, dim=0)  # [Hq, T, D]
    whole, part = full @ values, streaming @ values  # [Hq, n, D]
    change = (whole - part).square().sum((1, 2))
    size = (whole.square() + part.square()).sum((1, 2))
    return change / (2 * size).clamp_min(1e-30)
