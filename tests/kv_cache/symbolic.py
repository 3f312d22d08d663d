"""A worker whose caches hold names of tokens instead of numbers, and the histories that it runs.

Every slot of the pool remembers which token of which text was last written there. Before a step's
attention the worker looks whether each query would meet the tokens that the rule says, so a block
given away too early, a ring restored from the wrong place or a hash that outlived its contents is
found in the step where it would have changed an answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from benchmarks.simulated_engine import SimulatedEngine
from vllm_duo.compat.snapshot_orders import ATTRIBUTE
from vllm_duo.kv_cache.integrity import check_integrity
from vllm_duo.kv_cache.layout import Layout, cdiv

Name = tuple[int, int]
"""A token: its position, and the hash of the text up to it (salt included)."""


class SymbolicWorker:
    """Carries out a step's writes and copies as the operators do, and checks what would be read.

    Args:
        layout: what runs.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.tables: dict[str, list[list[int]]] = {}
        # By block: the group that wrote it last (a block is one piece of memory for all groups) and
        # what each of its slots holds.
        self.memory: dict[int, tuple[int, dict[int, Name]]] = {}

    def execute(self, output: Any, texts: dict[str, list[Name]]) -> None:
        """Run one step.

        Args:
            output: vLLM's ``SchedulerOutput``.
            texts: names of the known tokens, by request.
        """
        contexts = self._update_tables(output)
        chunks = {
            request: (contexts[request], contexts[request] + tokens)
            for request, tokens in output.num_scheduled_tokens.items()
        }
        for request, (low, high) in chunks.items():
            self._write_retrieval(request, low, high, texts[request])
        for order in getattr(output, ATTRIBUTE, ()):
            self._copy(order, chunks[order.request_id], texts[order.request_id])
        for request, (low, _) in chunks.items():
            self._check_reads(request, low, texts[request])
        for request, (low, high) in chunks.items():
            self._write_streaming(request, low, high, texts[request])

    def _update_tables(self, output: Any) -> dict[str, int]:
        """Follow the scheduler's block tables as vLLM's runner does; context of each request."""
        contexts = {}
        for request in output.finished_req_ids:
            self.tables.pop(request, None)
        for new in output.scheduled_new_reqs:
            self.tables[new.req_id] = [list(ids) for ids in new.block_ids]
            contexts[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for request, ids, computed in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            contexts[request] = computed
            if request in cached.resumed_req_ids:
                self.tables[request] = [list(group) for group in ids]
            elif ids is not None:
                for table, more in zip(self.tables[request], ids, strict=True):
                    table.extend(more)
        return contexts

    @property
    def _first_bin(self) -> int:
        return int(self.layout.has_retrieval)

    def _slots(self, block: int, group: int) -> dict[int, Name]:
        """A block's slots as this group sees them: nothing, if another wrote there last."""
        owner, slots = self.memory.get(block, (group, {}))
        return slots if owner == group else {}

    def _write(self, block: int, group: int, slot: int, name: Name) -> None:
        assert block != 0, "the null block must never be written"
        owner, slots = self.memory.get(block, (-1, {}))
        if owner != group:
            slots = {}
            self.memory[block] = (group, slots)
        slots[slot] = name

    def _ring(self, request: str, group: int, position: int) -> tuple[int, int]:
        """Block and slot of a position in a bin's ring."""
        span = self.layout.span
        slot = span.slot(position)
        return self.tables[request][group][slot // span.block_size], slot % span.block_size

    def _write_retrieval(self, request: str, low: int, high: int, text: list[Name]) -> None:
        if self.layout.has_retrieval:
            size = self.layout.block_size
            for position in range(low, high):
                block = self.tables[request][0][position // size]
                self._write(block, 0, position % size, text[position])

    def _write_streaming(self, request: str, low: int, high: int, text: list[Name]) -> None:
        span = self.layout.span
        for group in range(self._first_bin, self.layout.num_groups):
            for position in range(low, high):
                if position < span.sink_size or position >= high - span.ring_size:
                    block, slot = self._ring(request, group, position)
                    self._write(block, group, slot, text[position])

    def _copy(self, order: Any, chunk: tuple[int, int], text: list[Name]) -> None:
        span, group = self.layout.span, self._first_bin + order.bin
        table = self.tables[order.request_id][group][: len(order.blocks)]
        assert len(order.blocks) == span.blocks(order.num_tokens) == len(table)
        if not order.store:
            assert chunk[0] == order.num_tokens, "a restored request resumes at the snapshot"
        else:
            assert chunk[0] < order.num_tokens <= chunk[1], "the boundary lies in the chunk"
        for ring, kept in zip(table, order.blocks, strict=True):
            source, target = (ring, kept) if order.store else (kept, ring)
            assert target != 0
            self.memory[target] = (group, dict(self._slots(source, group)))
        if order.store:
            for position in range(chunk[0], order.num_tokens):
                if position < span.sink_size or position >= order.num_tokens - span.ring_size:
                    slot = span.slot(position)
                    block = order.blocks[slot // span.block_size]
                    self._write(block, group, slot % span.block_size, text[position])

    def _check_reads(self, request: str, context: int, text: list[Name]) -> None:
        """Every token of the context that the chunk's first query sees must be where it is read."""
        span, size = self.layout.span, self.layout.block_size
        if self.layout.has_retrieval:
            for position in range(context):
                block = self.tables[request][0][position // size]
                found = self._slots(block, 0).get(position % size)
                assert found == text[position], (request, "retrieval", position, found)
        recent = range(max(context - span.recent_size + 1, 0), context)
        for position in {*range(min(context, span.sink_size)), *recent}:
            for group in range(self._first_bin, self.layout.num_groups):
                block, slot = self._ring(request, group, position)
                found = self._slots(block, group).get(slot)
                assert found == text[position], (request, group, position, found)


@dataclass(eq=False)
class History:
    """Requests that come, share prefixes, grow, are preempted, aborted, and finish.

    Attributes:
        engine: vLLM's scheduler and managers over a pool that is too small for all requests.
    """

    engine: SimulatedEngine
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def __post_init__(self) -> None:
        assert self.engine.layout is not None
        self.layout = self.engine.layout
        self.worker = SymbolicWorker(self.layout)
        self.ended: list[list[int]] = [[]]
        self.names: dict[str, list[Name]] = {}

    def add(
        self, base: int, shared: int, tail: int, answer: int, *, copies: int = 1, salt: int = 0
    ) -> None:
        """Queue requests of one prompt: some text of a finished request, then tokens of its own.

        Args:
            base: which finished request's text to begin with.
            shared: tokens of it, at most.
            tail: tokens of the prompt's own.
            answer: tokens to generate.
            copies: requests, as ``n`` in vLLM's API makes them.
            salt: of the prefix cache; 0 for none.
        """
        text = self.ended[base % len(self.ended)][:shared]
        random = Random(f"{base} {shared} {tail}")
        prompt = text + [random.randrange(3) for _ in range(tail)]
        for _ in range(copies):
            self.counts["added"] += 1
            self.engine.add(
                str(self.counts["added"]),
                prompt,
                max_tokens=answer,
                cache_salt=str(salt) if salt else None,
                priority=tail % 3,
            )

    def step(self) -> None:
        """One step of the scheduler, run by the worker; then all accounts are checked."""
        scheduler = self.engine.scheduler
        output = scheduler.schedule()
        self.worker.execute(output, self._texts(output.num_scheduled_tokens))
        self.counts["steps"] += 1
        self.counts["preempted"] += len(output.preempted_req_ids or ())
        self.counts["hits"] += sum(new.num_computed_tokens for new in output.scheduled_new_reqs)
        self.check()
        before = dict(scheduler.requests)
        scheduler.update_from_output(output, self.engine.sample(output))
        for name, request in before.items():
            if name not in scheduler.requests:
                self.ended = [*self.ended[-7:], list(request.all_token_ids)]
        self.check()

    def abort(self, which: int) -> None:
        """Abort one of the requests that have not finished, in whatever state."""
        from vllm.v1.request import RequestStatus

        requests = sorted(self.engine.scheduler.requests)
        if requests:
            name = requests[which % len(requests)]
            self.engine.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            self.counts["aborted"] += 1
            self.check()

    def reset(self, running: bool) -> None:
        """Empty the prefix cache; with ``running``, preempt all requests for it."""
        done = self.engine.scheduler.reset_prefix_cache(reset_running_requests=running)
        self.counts["resets"] += bool(done)
        self.check()

    def drain(self) -> None:
        """Run until nothing is left: every request ends and every block comes back."""
        limit = self.counts["steps"] + 2000
        while self.engine.scheduler.get_num_unfinished_requests():
            assert self.counts["steps"] < limit, "requests starve"
            self.step()
        self.step()
        pool = self.engine.manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1

    def check(self) -> None:
        """The pool's accounts, and what each request holds against the layout's formulas."""
        check_integrity(self.engine.manager)
        for request in self.engine.scheduler.running:
            tables = self.engine.manager.get_block_ids(request.request_id)
            tokens = request.num_computed_tokens
            paged = [cdiv(tokens, self.layout.block_size)] * self.layout.has_retrieval
            rings = [self.layout.span.blocks(tokens)] * len(self.layout.bins)
            assert [len(table) for table in tables] == paged + rings, (request.request_id, tokens)

    def _texts(self, requests: Iterable[str]) -> dict[str, list[Name]]:
        for name in requests:
            request = self.engine.scheduler.requests[name]
            names = self.names.setdefault(name, [])
            tokens = request.all_token_ids
            last = names[-1][1] if names else hash((request.cache_salt,))
            for position in range(len(names), len(tokens)):
                last = hash((last, tokens[position]))
                names.append((position, last))
        return self.names
