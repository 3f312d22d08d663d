"""Histories of requests over vLLM's own scheduler, each step carried out by the shadow worker.

A block given away too early, a ring restored from the wrong place or a hash that outlived its contents
is found in the step where it would have changed an answer.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from random import Random

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

from benchmarks.simulated_engine import SimulatedEngine
from tests.kv_cache.shadow_worker import ShadowWorker
from vllm_duo.kv_cache.integrity import check_integrity
from vllm_duo.kv_cache.rounding import cdiv

WRONG = 1000
"""Added to a token that the model will sample, it is one that it will not."""


@dataclass(eq=False)
class History:
    """Requests that come, share prefixes, grow, are preempted, aborted, and finish.

    Attributes:
        engine: vLLM's scheduler and managers over a pool that is too small for all requests.
        random: chooses how many drafts a request gets, and how many of them are right.
        surplus: drafts beyond what the server was started for, at most.
    """

    engine: SimulatedEngine
    random: Random = field(default_factory=lambda: Random(0))
    surplus: int = 0
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def __post_init__(self) -> None:
        assert self.engine.layout is not None
        self.layout = self.engine.layout
        self.worker = ShadowWorker(self.engine)
        self.ended: list[list[int]] = [[]]

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
        self.worker.requests.update(scheduler.requests)
        self.worker.execute(output)
        self.counts["steps"] += 1
        self.counts["preempted"] += len(output.preempted_req_ids or ())
        self.counts["hits"] += sum(new.num_computed_tokens for new in output.scheduled_new_reqs)
        self.check()
        before = dict(scheduler.requests)
        sampled = self.engine.sample(output)
        scheduler.update_from_output(output, sampled)
        self._draft(output, sampled)
        for name, request in before.items():
            if name not in scheduler.requests:
                self.ended = [*self.ended[-7:], list(request.all_token_ids)]
        self.check()

    def _draft(self, output: SchedulerOutput, sampled: ModelRunnerOutput) -> None:
        """Count what became of the step's drafts, and make new ones: some right, then wrong ones."""
        for name, drafts in output.scheduled_spec_decode_tokens.items():
            tokens = sampled.sampled_token_ids[sampled.req_id_to_index[name]]
            self.counts["longest"] = max(self.counts["longest"], len(drafts))
            self.counts["padding"] += drafts.count(-1)
            self.counts["accepted"] += len(tokens) - 1
            self.counts["rejected"] += len(drafts) + 1 - len(tokens)
        scheduler = self.engine.scheduler
        if scheduler.num_spec_tokens == 0:
            return
        requests = [r for r in map(scheduler.requests.get, output.num_scheduled_tokens) if r]
        made = []
        for request in requests:
            count = self.random.randrange(scheduler.num_spec_tokens + self.surplus + 1)
            right = self.random.randrange(count + 1)
            after = [
                self.engine.token(request.request_id, request.num_output_tokens + index)
                for index in range(count)
            ]
            made.append(after[:right] + [token + WRONG for token in after[right:]])
        names = [request.request_id for request in requests]
        scheduler.update_draft_token_ids(DraftTokenIds(names, made))

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
        scheduler = self.engine.scheduler
        for request in scheduler.running:
            tables = self.engine.manager.get_block_ids(request.request_id)
            tokens = request.num_computed_tokens
            drafts = scheduler.num_spec_tokens + scheduler.num_lookahead_tokens
            least, most = self._blocks(tokens), self._blocks(tokens + drafts)
            assert len(tables) == len(least)
            for table, low, high in zip(tables, least, most, strict=True):
                # Blocks that were claimed for drafts stay when these are rejected.
                assert low <= len(table) <= high, (request.request_id, tokens)

    def _blocks(self, tokens: int) -> list[int]:
        """Blocks of each group for a request of so many tokens."""
        paged = [cdiv(tokens, self.layout.block_size)] * self.layout.has_retrieval
        return paged + [span.blocks(tokens) for span in self.layout.spans]
