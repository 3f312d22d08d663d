"""A worker without tensors: for each slot of the pool it knows which prefix wrote it.

It carries out scheduler outputs as the real worker does (the order of ``DuoAttentionImpl.forward``)
and fails where a query would read anything but its own request's keys. Two requests with the same
tokens (and salt) up to a position have the same key there, so hits are right exactly if the prefixes
are. A draft has the key of its own token until the scheduler knows which token is in its place.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from benchmarks.simulated_engine import SimulatedEngine
from vllm_duo.compat.snapshot_orders import ATTRIBUTE
from vllm_duo.kv_cache.orders import SnapshotOrder
from vllm_duo.kv_cache.spec import RetrievalSpec, StreamingSpec

Slots = dict[int, int]


class ShadowWorker:
    """Executes steps one after another.

    Args:
        engine: whose scheduler makes the steps.
    """

    def __init__(self, engine: SimulatedEngine) -> None:
        groups = engine.manager.kv_cache_config.kv_cache_groups
        self.engine = engine
        self.specs = [group.kv_cache_spec for group in groups]
        # Group and slots of each block, as last written.
        self.memory: dict[int, tuple[int, Slots]] = {}
        self.tables: dict[str, list[list[int]]] = {}
        # A request's tokens stay known when it is aborted before its step is carried out.
        self.requests: dict[str, Request] = {}
        self.keys: dict[str, list[int]] = {}
        self.drafts: dict[str, list[int]] = {}
        self.restored = self.stored = self.steps = 0

    def execute(self, step: SchedulerOutput) -> dict[str, int]:
        """Write, copy, check what would be read, write.

        Returns:
            Tokens computed by then, by request.
        """
        self.steps += 1
        self._update_tables(step)
        self.drafts = step.scheduled_spec_decode_tokens
        context = self._context(step)
        spans = {r: (context[r], context[r] + n) for r, n in step.num_scheduled_tokens.items()}
        self.touched: dict[int, int] = {}
        for group, spec in enumerate(self.specs):
            if isinstance(spec, RetrievalSpec):
                for request, span in spans.items():
                    self._write_pages(group, spec.block_size, request, *span)
        for order in getattr(step, ATTRIBUTE, ()):
            self._copy(order, *spans[order.request_id])
        for request, span in spans.items():
            for group, spec in enumerate(self.specs):
                if isinstance(spec, StreamingSpec):
                    self._check_ring(group, spec, request, span[0])
                    self._write_ring(group, spec, self._table(group, request), request, *span)
                else:
                    # Every position of a prompt; of a long answer a part of them in each step.
                    every = 1 if span[1] - span[0] > 1 or span[1] < 200 else 8
                    self._check_pages(group, spec.block_size, request, span[1], every)
        return {request: end for request, (_, end) in spans.items()}

    def _update_tables(self, step: SchedulerOutput) -> None:
        for name in step.finished_req_ids:
            self.tables.pop(name, None)
        for new in step.scheduled_new_reqs:
            self.tables[new.req_id] = [list(ids) for ids in new.block_ids]
            self.keys.setdefault(new.req_id, [])
        cached = step.scheduled_cached_reqs
        for name, ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if name in cached.resumed_req_ids:
                self.tables[name] = [list(group) for group in ids]
            elif ids is not None:
                for table, group in zip(self.tables[name], ids, strict=True):
                    table += group

    def _context(self, step: SchedulerOutput) -> dict[str, int]:
        cached = step.scheduled_cached_reqs
        context = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        return context | {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}

    def _key(self, request: str, position: int) -> int:
        """Stands for the key of this position: depends on all tokens up to it, and on the salt."""
        keys, known = self.keys[request], self.requests[request]
        while len(keys) <= position and len(keys) < known.num_tokens:
            before = keys[-1] if keys else known.cache_salt
            keys.append(hash((before, known.all_token_ids[len(keys)])))
        if position < known.num_tokens:
            return keys[position]
        key, ahead = keys[-1], position + 1 - known.num_tokens
        assert ahead <= len(self.drafts[request])
        for draft in self.drafts[request][:ahead]:
            key = hash((key, draft))
        return key

    def _table(self, group: int, request: str) -> list[int]:
        return self.tables[request][group]

    def _touch(self, group: int, block: int) -> None:
        """A block belongs to one group in a step, or layers would overwrite each other."""
        assert block != 0, "the null block is never written"
        assert self.touched.setdefault(block, group) == group, f"two groups use block {block}"

    def _slots(self, group: int, block: int, write: bool = False) -> Slots:
        if write:
            self._touch(group, block)
        owner, slots = self.memory.get(block, (group, {}))
        if owner != group:
            slots = {}
        if write:
            self.memory[block] = (group, slots)
        return slots

    def _write_pages(self, group: int, size: int, request: str, start: int, end: int) -> None:
        table = self._table(group, request)
        for position in range(start, end):
            slots = self._slots(group, table[position // size], write=True)
            slots[position % size] = self._key(request, position)

    def _check_pages(self, group: int, size: int, request: str, end: int, every: int) -> None:
        table = self._table(group, request)
        for position in range(end % every, end, every):
            found = self._slots(group, table[position // size]).get(position % size)
            assert found == self._key(request, position), (request, "page", position)

    def _copy(self, order: SnapshotOrder, start: int, end: int) -> None:
        group = next(
            index
            for index, spec in enumerate(self.specs)
            if isinstance(spec, StreamingSpec) and spec.bin == order.bin
        )
        spec = self.specs[group]
        table = self._table(group, order.request_id)[: len(order.blocks)]
        assert len(table) == len(order.blocks)
        source, target = (table, order.blocks) if order.store else (order.blocks, table)
        for read, written in zip(source, target, strict=True):
            slots = dict(self._slots(group, read))
            self._touch(group, written)
            self.memory[written] = (group, slots)
        if not order.store:
            assert order.num_tokens == start
            self.restored += 1
            return
        assert start - spec.draft_size <= order.num_tokens <= end
        self._write_ring(group, spec, list(order.blocks), order.request_id, start, order.num_tokens)
        self.stored += 1

    def _write_ring(
        self, group: int, spec: StreamingSpec, blocks: list[int], request: str, start: int, end: int
    ) -> None:
        span = spec.span
        for position in range(start, end):
            if position < spec.sink_size or position >= end - span.ring_size:
                column, offset = self._place(span, position)
                self._slots(group, blocks[column], write=True)[offset] = self._key(
                    request, position
                )

    def _place(self, span: Any, position: int) -> tuple[int, int]:
        return divmod(span.slot(position), span.block_size)

    def _check_ring(self, group: int, spec: StreamingSpec, request: str, start: int) -> None:
        table = self._table(group, request)
        for position in range(start):
            if position < spec.sink_size or position > start - spec.recent_size:
                column, offset = self._place(spec.span, position)
                found = self._slots(group, table[column]).get(offset)
                assert found == self._key(request, position), (request, "ring", position, start)
