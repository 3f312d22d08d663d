r"""Exclusive: whole layers of retrieval heads and whole layers of streaming heads.

Source: ZigzagAttention, arXiv:2508.12407. A layer of one class needs one attention call and one
cache instead of two.

Given values v [L, Hkv] in [0, 1] of any method and a budget of m retrieval layers, that is of
m * Hkv retrieval heads and so of the same KV bytes as any pattern with as many, the retrieval
layers are those that move the values least to their classes:

    minimise over sets S of m layers:  sum_{l in S, h} (1 - v[l, h]) + sum_{l not in S, h} v[l, h],

which the m layers with the highest mean value do, for every m.

Left open by the paper and chosen here: the distance above; equal means put the lower layer first;
the value of the n-th of L layers is 1 - n / L for all of its heads, n from 0, so that no two layers
tie. A sparsity that is no multiple of 1 / L cuts one layer in two; REPORT.md lists those that do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_duo.heads import HeadPattern
from vllm_duo.identify.methods import Floats, Scores


def make_exclusive(pattern: HeadPattern, layers: Sequence[int] | None = None) -> Scores:
    """A layer-exclusive pattern from any pattern; [L, Hkv] as before.

    Args:
        pattern: the values.
        layers: those that it chooses in; the heads of others, which slide anyhow, get 0. None: all.
    """
    chosen = range(pattern.num_layers) if layers is None else layers
    means: Floats = np.clip(pattern.values, 0.0, 1.0).mean(axis=1)
    order = np.array(chosen)[np.argsort(-means[list(chosen)], kind="stable")]
    ranked = np.zeros(pattern.num_layers)
    ranked[order] = 1.0 - np.arange(len(chosen)) / len(chosen)
    values = np.repeat(ranked[:, None], pattern.num_kv_heads, axis=1)
    details = {
        "source_pattern": str(pattern.path) if pattern.path else None,
        "source_method": pattern.metadata.get("method"),
        "layer_means": [round(float(mean), 6) for mean in means],
    }
    return Scores(values, details)


def exclusive_sparsities(num_layers: int) -> list[float]:
    """The sparsities at which no layer holds both classes."""
    return [count / num_layers for count in range(num_layers + 1)]
