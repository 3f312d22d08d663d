"""What a router makes of vLLM's KV cache events."""

from __future__ import annotations

from collections import Counter, defaultdict

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored


class Consumer:
    """Knows by hash which blocks of tokens each group keeps; takes an event publisher's place.

    Attributes:
        groups: by group, the stored blocks not yet removed; a hash may be stored several times.
        events: all so far.
        kinds: by group, the kinds that it was said to be of.
    """

    def __init__(self):
        self.groups = defaultdict(Counter)
        self.events = []
        self.kinds = defaultdict(set)

    def publish(self, batch):
        for event in batch.events:
            self.take(event)

    def take(self, event):
        self.events.append(event)
        if isinstance(event, AllBlocksCleared):
            self.groups.clear()
        elif isinstance(event, BlockStored):
            assert len(event.token_ids) == event.block_size * len(event.block_hashes)
            assert len(event.extra_keys or event.block_hashes) == len(event.block_hashes)
            self.groups[event.group_idx].update(event.block_hashes)
            self.kinds[event.group_idx].add(event.kv_cache_spec_kind)
        else:
            assert isinstance(event, BlockRemoved)
            own = self.groups[event.group_idx]
            own.subtract(event.block_hashes)
            assert min(own.values()) >= 0, "removed, but never stored"
            self.groups[event.group_idx] = +own

    def resumable(self, hashes, paged, streaming):
        """Blocks of a prompt after which every group lets it be resumed.

        Args:
            hashes: of its whole blocks, in order.
            paged: groups that must keep all blocks up to there.
            streaming: groups that must tell of the block that ends there.
        """
        longest = 0
        for count, block in enumerate(hashes, 1):
            if any(block not in self.groups[group] for group in paged):
                break
            if all(block in self.groups[group] for group in streaming):
                longest = count
        return longest
