"""What the scheduler asks the worker to copy between a request's ring and a snapshot of it.

A *snapshot* is a copy of a request's streaming state at a block boundary: the same blocks in the same
order as its table there, kept in the pool for prefix hits. Orders travel with the step they belong to
and are carried out one after another in every streaming layer, before the step's attention: a later
order may read what an earlier one of the same step has stored.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SnapshotOrder:
    """One copy.

    Attributes:
        store: True to copy the request's state to ``blocks``, False to restore it from them.
        request_id: whose ring.
        bin: which bin of streaming layers.
        num_tokens: the boundary: the state is that of a request of so many tokens. A restored request
            has exactly this context; a stored boundary lies in the step's chunk, at its end, or among
            the drafts that the step before it computed.
        blocks: pool blocks of the snapshot, in table order.
    """

    store: bool
    request_id: str
    bin: int
    num_tokens: int
    blocks: tuple[int, ...]
