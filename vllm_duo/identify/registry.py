"""The identification methods by name."""

from __future__ import annotations

from vllm_duo.identify.induction import Induction
from vllm_duo.identify.methods import ForwardMethod
from vllm_duo.identify.on_the_fly import OnTheFly
from vllm_duo.identify.retrieval_score import RetrievalScore

FORWARD_METHODS: dict[str, ForwardMethod] = {
    method.name: method for method in (RetrievalScore(), Induction(), OnTheFly())
}
"""Methods that score samples one by one."""

DESCRIPTIONS = {
    "gates": "DuoAttention: trains one gate a KV head (arXiv:2410.10819)",
    "retrieval-score": "how often a head copies the answer's tokens (arXiv:2404.15574)",
    "induction": "RazorAttention: echo and induction heads on repeats (arXiv:2407.15891)",
    "on-the-fly": "how much a head's output changes when it streams; no training",
    "exclusive": "ZigzagAttention: whole layers, from another pattern (arXiv:2508.12407)",
}
"""Every method, in a few words."""
