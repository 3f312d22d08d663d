"""What the scheduler's side of the connector asks the worker's side to copy in a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from vllm_duo.kv_transfer.store import Key

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """Bytes that were read and checked, for blocks of the pool.

    Attributes:
        blocks: [n] pool blocks.
        data: [n, width] uint8, the first bytes of each; numpy's arrays travel to the worker uncopied.
    """

    blocks: tuple[int, ...]
    data: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Save:
    """Blocks of the pool that one file is to be made of, as they are after the step.

    Attributes:
        key: the file.
        blocks: per group its pool blocks and the bytes of each that count.
        when_ns: when the file was last used.
        replace: write it though there is one, which is damaged.
    """

    key: Key
    blocks: tuple[tuple[tuple[int, ...], int], ...]
    when_ns: int
    replace: bool = False


@dataclass(slots=True, eq=False)
class StorageMetadata(KVConnectorMetadata):
    """One step's; carried from the scheduler to the worker by vLLM.

    Attributes:
        server: the identity that the scheduler looks up under. A worker's copy of the config may have
            been changed by loading the model, so it does not find out its own.
        loads: before the forward pass.
        saves: after it.
    """

    server: bytes
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
