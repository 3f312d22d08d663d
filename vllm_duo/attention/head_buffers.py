"""A layer's head map on a GPU, where vLLM's sleep mode keeps it."""

from __future__ import annotations

import torch

from vllm_duo.ops import gpu
from vllm_duo.ops.batch import HeadMap


class HeadBuffers(torch.nn.Module):
    """The device tensors of a head map as buffers of the model.

    What is allocated while weights load is lost at sleep level 2, and vLLM saves and restores the
    model's buffers alone: without them a woken server would read any heads' memory. They keep their
    place, so the head map, and graphs that read it, need not know.

    Args:
        heads: the layer's head classes, on the device.
    """

    def __init__(self, heads: HeadMap) -> None:
        super().__init__()
        retrieval, streaming = gpu.head_indices(heads)
        tensors = {
            "retrieval": heads.retrieval,
            "streaming": heads.streaming,
            "retrieval_int32": retrieval,
            "streaming_int32": streaming,
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
