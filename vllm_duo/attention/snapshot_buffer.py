"""The step's snapshot copies on a GPU, in a buffer that keeps its place between steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_duo.ops import gpu
from vllm_duo.ops.batch import SnapshotCopy

ORDERS_PER_REQUEST = 8
"""Copies of a step for each request that may run at once, beyond which a step is an error."""


@dataclass(frozen=True, eq=False)
class SnapshotBuffer:
    """One bin's copies of a step.

    A CUDA graph of a decode step has the copying kernel in it and replays it over whatever stands in
    the buffer then: mostly no copies.

    Attributes:
        orders: [1 + n, ORDER_HEADER + width] int32 on the device, the number of copies in front.
    """

    orders: torch.Tensor

    @classmethod
    def allocate(cls, most: int, width: int, device: torch.device) -> SnapshotBuffer:
        """Make an empty buffer.

        Args:
            most: copies that it can hold.
            width: columns of the ring's block table.
            device: where it lies.
        """
        shape = (1 + most, gpu.ORDER_HEADER + width)
        return cls(torch.zeros(shape, dtype=torch.int32, device=device))

    def fill(self, copies: Sequence[SnapshotCopy]) -> torch.Tensor:
        """Put the step's copies in place of the last step's, without waiting for the device.

        Args:
            copies: in order, their blocks on the host.

        Returns:
            The buffer.

        Raises:
            RuntimeError: there are more copies than fit.
        """
        if not copies:
            self.orders[:1].zero_()
            return self.orders
        if len(copies) >= len(self.orders):
            raise RuntimeError(
                f"a step has {len(copies)} snapshot copies in one bin and the buffer holds "
                f"{len(self.orders) - 1}; this is a defect of vllm-duo, please report it with the "
                "server's flags"
            )
        packed = gpu.pack_copies(copies, self.orders.shape[1] - gpu.ORDER_HEADER)
        if self.orders.is_cuda:
            packed = packed.pin_memory()
        self.orders[: len(packed)].copy_(packed, non_blocking=True)
        return self.orders
