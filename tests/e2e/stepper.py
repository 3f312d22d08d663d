"""Drives an in-process engine step by step; after every step the block pool's accounts must hold."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

from vllm.sampling_params import RequestOutputKind, SamplingParams

from tests.e2e.engine import answer_of
from vllm_duo.kv_cache.integrity import check_integrity
from vllm_duo.kv_cache.manager import RingManager
from vllm_duo.kv_cache.rounding import cdiv
from vllm_duo.kv_cache.snapshot_manager import SnapshotManager

MAX_STEPS = 2000
"""A hang is a failure: no test here needs half as many."""


class Stepper:
    """Requests by name, and what became of them.

    Attributes:
        outputs: vLLM's output of each finished request.
        preempted: how often each request was preempted, by vLLM's own id.
        withdrawn: preempted after the same step had already planned tokens of it.
    """

    def __init__(self, running, monkeypatch):
        self.running = running
        self.engine = running.llm.llm_engine
        self.scheduler = running.core.scheduler
        self.pool = running.manager.block_pool
        self.outputs = {}
        self.preempted = Counter()
        self.withdrawn = 0
        self.borrowed = []
        # Tokens for which a request may hold blocks beyond those that it has computed.
        self.drafts = self.scheduler.num_spec_tokens + self.scheduler.num_lookahead_tokens
        preempt = self.scheduler._preempt_request

        def record(request, *args, **kwargs):
            self.preempted[request.request_id] += 1
            planned = running.manager.coordinator.single_type_managers[0].num_cached_block
            computed = request.num_computed_tokens // 16
            self.withdrawn += planned.get(request.request_id, 0) > computed
            return preempt(request, *args, **kwargs)

        monkeypatch.setattr(self.scheduler, "_preempt_request", record)

    def add(self, name, prompt, *, max_tokens=32, priority=0, salt=None, **sampling):
        """Queue a request; greedy unless ``sampling`` says otherwise."""
        params = SamplingParams(
            max_tokens=max_tokens,
            logprobs=3,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **{"temperature": 0.0, **sampling},
        )
        inputs = {"prompt_token_ids": list(prompt)} | ({"cache_salt": salt} if salt else {})
        self.engine.add_request(name, inputs, params, priority=priority)

    def step(self, count=1):
        for _ in range(count):
            for output in self.engine.step():
                if output.finished:
                    assert output.request_id not in self.outputs, "finished twice"
                    self.outputs[output.request_id] = output
            self.check()

    def run(self):
        """Step until nothing is left."""
        steps = 0
        while self.engine.has_unfinished_requests():
            self.step()
            steps += 1
            assert steps < MAX_STEPS, f"{self.scheduler.get_request_counts()} requests hang"
        self.step()  # the engine hears of the last ones' end
        assert not self.scheduler.requests
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1

    def ask(self, name, prompt, **kwargs):
        """One request alone; returns its answer."""
        self.add(name, prompt, **kwargs)
        self.run()
        return self.answer(name)

    def ask_all(self, prompts, **kwargs):
        """All requests at once, named 0, 1 and so on; returns their answers."""
        for index, prompt in enumerate(prompts):
            self.add(str(index), prompt, **kwargs)
        self.run()
        return [self.answer(str(index)) for index in range(len(prompts))]

    def answer(self, name):
        return answer_of(self.outputs[name])

    def hit(self, name):
        """Tokens that vLLM took from its prefix cache."""
        return self.outputs[name].num_cached_tokens

    def request(self, name):
        """vLLM's request; its id is the name with a random end."""
        (found,) = (r for key, r in self.scheduler.requests.items() if key.startswith(f"{name}-"))
        return found

    @contextmanager
    def blocks_left(self, count):
        """Hold all free blocks but ``count`` for a while; those with cached tokens are held last."""
        self.borrowed = self.pool.get_new_blocks(self.pool.get_num_free_blocks() - count)
        yield
        self.pool.free_blocks(self.borrowed)
        self.borrowed = []

    def check(self):
        """Raise unless the pool's accounts hold and no table is longer than its request's tokens ask
        for."""
        check_integrity(self.running.manager, self.borrowed)
        running = {request.request_id: request for request in self.scheduler.running}
        for manager in self.running.manager.coordinator.single_type_managers:
            check_tables(manager, running, self.drafts)


def check_tables(manager, running, drafts=0):
    """One group's tables are those of running requests, as long as the formulas say, and its
    snapshots are settled. Blocks that were claimed for drafts stay when these are rejected."""
    assert manager.req_to_blocks.keys() <= running.keys(), (
        "a request that does not run holds blocks"
    )
    assert manager.num_cached_block.keys() <= running.keys()
    for request_id, table in manager.req_to_blocks.items():
        num_tokens = running[request_id].num_computed_tokens
        if isinstance(manager, RingManager):
            blocks = manager.allocator.span.blocks
            assert blocks(num_tokens) <= len(table) <= blocks(num_tokens + drafts)
            assert all(block.block_hash is None for block in table)
        else:
            most = cdiv(num_tokens + drafts, manager.block_size)
            assert cdiv(num_tokens, manager.block_size) <= len(table) <= most
            assert all(block.block_hash is not None for block in table if block.ref_cnt > 1)
    if isinstance(manager, SnapshotManager):
        assert (manager._orders, manager.snapshots.held, manager._late) == ([], [], [])
        assert manager._trails.keys() <= running.keys()
