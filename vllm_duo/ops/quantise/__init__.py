"""``quantise`` and ``dequantise``: what a quantised cache keeps of keys and values.

The compiled kernels quantise a step's tokens themselves, before anything of the step reads them: a
query sees its own chunk as a later one will see it in the cache, so that the result does not depend on
how a prompt is cut into chunks. These functions say what they do, for tests and for people.
"""

from vllm_duo.ops.quantise.reference import dequantise, quantise

__all__ = ["dequantise", "quantise"]
