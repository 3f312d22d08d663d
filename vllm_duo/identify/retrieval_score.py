r"""Retrieval score: how often a head's strongest attention is on the very token that is copied.

Source: Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality",
arXiv:2404.15574, section 2.

While token w of the needle k is generated, head h has attention a [T] over the context. It copies w
if w is in k, j = argmax(a) lies within the needle, and the token at j is w. With g_h the tokens that
it copies, its score is

    |g_h and k| / |k|,  averaged over the samples: [L, Hq] in [0, 1].

Under `needle_match = "anywhere"` (not the paper's) the token at j need not be w: the strongest
attention must lie anywhere in the sentence that holds the key. Models often move a token's identity
into the token after it and fetch it from there, which the paper's score does not see.

Left open by the paper and chosen here:
- the right answer is given token by token instead of the model's own, and a token counts as
  generated where the model's most likely token is that one;
- k are the tokens of the key; the needle is the whole sentence that holds it;
- a key's tokens count by their places, so that a digit that comes twice counts twice;
- a head whose learned sink gets more than any token has its strongest attention there, and copies
  nothing: in other models such a head looks at the first token;
- KV heads: `gqa`, max or mean over the group's query heads (the paper has none).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vllm_duo.identify.attention import Softmax, attention_rows, full_attention
from vllm_duo.identify.methods import Floats, Job, Scores, by_layer, to_kv_heads


class RetrievalScore:
    """See the module."""

    name = "retrieval-score"
    default_samples = 40

    @torch.no_grad()
    def score(self, job: Job, index: int) -> Floats:
        """[L, Hq] of one sample."""
        sample = job.samples().make("identify", index)
        ids = torch.tensor([sample.ids], device=job.model.device)
        rows = torch.tensor(sample.key_queries(), device=job.model.device)
        spans = [
            needle
            for needle, (first, end) in zip(sample.needles, sample.keys, strict=True)
            for _ in range(first, end)
        ]
        low, high = torch.tensor(spans, device=job.model.device).unbind(1)  # [n] each
        hits: dict[int, Tensor] = {}

        def look(layer: int, query: Tensor, key: Tensor, value: Tensor, softmax: Softmax) -> Tensor:
            weights = attention_rows(query, key, softmax, rows)  # [Hq, n, T]
            strongest = weights.argmax(-1)  # [Hq, n]
            inside = (strongest >= low) & (strongest < high)
            if softmax.sinks is not None:
                inside &= weights.amax(-1) > 1 - weights.sum(-1)
            if job.settings.needle_match == "exact":
                inside &= ids[0][strongest] == ids[0][rows + 1]
            hits[layer] = inside
            return full_attention(query, key, value, softmax)

        hidden = job.model.hidden(ids, look)
        generated = job.model.logits(hidden[0, rows]).argmax(-1) == ids[0][rows + 1]  # [n]
        counted = by_layer(hits, job.model.info.num_layers) & generated  # [L, Hq, n]
        return counted.double().mean(-1).cpu().numpy()

    def combine(self, job: Job, scores: Floats) -> Scores:
        """Mean over the samples, then over or among the query heads of a group."""
        mean = scores.mean(axis=0)
        values = to_kv_heads(mean, job.model.info.num_kv_heads, job.settings.gqa)
        return Scores(
            values, {"heads_above_0.1": int(np.sum(mean > 0.1))}, {"retrieval_score": mean}
        )
