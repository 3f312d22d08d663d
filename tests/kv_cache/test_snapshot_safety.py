"""Prefix hits never change what a query reads: seeded histories against a worker that remembers.

vLLM's scheduler and managers are real; the worker is ``shadow_worker.py``.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from random import Random

import pytest
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from benchmarks.simulated_engine import SimulatedEngine, make_engine
from tests.kv_cache.shadow_worker import ShadowWorker
from vllm_duo.kv_cache.manager import RingManager

BLOCK = 16
MAX_LEN = 640
SPARSITY = {"one bin": 0.5, "three bins": 0.75, "only streaming": 1.0}
KINDS = pytest.mark.parametrize("sparsity", SPARSITY.values(), ids=SPARSITY)


@cache
def layout_of(sparsity):
    return engine_of(sparsity, 1 << 31).layout


def engine_of(sparsity, pool_bytes, **settings):
    defaults = {
        "block_size": BLOCK,
        "max_model_len": MAX_LEN,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 128,
        "prefix_caching": True,
        "duo": {"sink_size": 20, "recent_size": 75, "snapshot_interval": 256},
    }
    return make_engine(
        "duo", "llama-3.1-8b", pool_bytes=pool_bytes, sparsity=sparsity, **(defaults | settings)
    )


def small_engine(sparsity=0.5, *, requests=1, snapshots=0, **settings):
    """An engine with blocks for so many of the longest requests, and for so many snapshots."""
    layout = layout_of(sparsity)
    blocks = requests * layout.blocks(MAX_LEN) + snapshots * layout.span.max_blocks + 1
    return engine_of(sparsity, blocks * layout.block_bytes, **settings)


class Driver:
    """Steps an engine with its worker, up to ``depth`` steps scheduled ahead."""

    def __init__(self, engine: SimulatedEngine, depth: int = 1):
        self.engine, self.depth = engine, depth
        self.worker = ShadowWorker(engine)
        self.ahead = deque()
        self.hits: dict[str, int] = {}
        self.preempted = 0

    def step(self):
        scheduler = self.engine.scheduler
        if scheduler.has_requests():
            step = scheduler.schedule()
            self.preempted += len(step.preempted_req_ids or ())
            for new in step.scheduled_new_reqs:
                self.hits[new.req_id] = new.num_computed_tokens
            self.worker.requests.update(scheduler.requests)
            self.ahead.append(step)
        while len(self.ahead) >= self.depth or (self.ahead and not scheduler.has_requests()):
            self.finish(self.ahead.popleft())
        return self

    def finish(self, step):
        ends = self.worker.execute(step)
        requests = self.engine.scheduler.requests
        sampled = []
        for name, end in ends.items():
            known = requests.get(name)
            whole = known is not None and end >= known.num_tokens
            sampled.append([(known.num_output_tokens * 31 + 7) % 3] if whole else [])
        self.engine.scheduler.update_from_output(
            step,
            ModelRunnerOutput(
                req_ids=list(ends),
                req_id_to_index={name: index for index, name in enumerate(ends)},
                sampled_token_ids=sampled,
            ),
        )

    def drain(self):
        while self.ahead:
            self.finish(self.ahead.popleft())

    def run(self, most=2_000):
        for _ in range(most):
            if not self.engine.scheduler.has_unfinished_requests():
                break
            self.step()
        else:
            raise AssertionError("requests hang")
        self.drain()
        self.check_idle()

    def check_idle(self):
        pool = self.engine.manager.block_pool
        for manager in self.engine.manager.coordinator.single_type_managers:
            if isinstance(manager, RingManager):
                manager.allocator.check_integrity()
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert all(block.ref_cnt == 0 for block in pool.blocks[1:])


def prompts(seed, count, most=400, vocabulary=3):
    """Prompts that share prefixes of many lengths: mostly continuations of one another."""
    random = Random(seed)
    made = [[random.randrange(vocabulary) for _ in range(random.randrange(1, most))]]
    for _ in range(count - 1):
        base = random.choice(made)
        cut = random.choice([len(base), random.randrange(len(base) + 1)])
        tail = [random.randrange(vocabulary) for _ in range(random.randrange(1, 120))]
        made.append((base[:cut] + tail)[:most])
    return made


@KINDS
def test_a_hit_needs_no_more_blocks_than_the_request(sparsity):
    """A prompt that fills the pool resumes at a snapshot by taking over its blocks."""
    driver = Driver(small_engine(sparsity, requests=1 if sparsity < 1 else 2))
    prompt = [index % 97 for index in range(MAX_LEN - 17)]
    driver.engine.add("first", prompt[:200], max_tokens=1)
    driver.run()
    driver.engine.add("longer", prompt, max_tokens=16)
    driver.run()
    assert driver.hits["longer"] == 192


@KINDS
def test_snapshots_are_stored_where_a_step_may_take_the_whole_pool(sparsity):
    """--max-num-batched-tokens beyond the pool: what the step leaves is enough for a snapshot."""
    driver = Driver(small_engine(sparsity, snapshots=3, max_num_batched_tokens=8_192))
    prompt = [7] * 500
    for name in ("first", "again"):
        driver.engine.add(name, prompt, max_tokens=4)
        driver.run()
    assert driver.hits["again"] == 496


def test_a_victim_of_its_own_step_leaves_nothing_to_hit():
    """By priority a request may lose its blocks after it was scheduled, before it was computed."""
    driver = Driver(
        small_engine(snapshots=4, scheduling_policy="priority", max_num_batched_tokens=512)
    )
    engine = driver.engine
    low = engine.add("low", [5] * 250, max_tokens=200, priority=5)
    driver.step()
    high = engine.add("high", [6] * 348, max_tokens=290, priority=0)
    while not low.num_preemptions:
        driver.step()
    # In the step that would have filled its last page, whose hash vLLM had already published.
    assert low.num_tokens % BLOCK == 0
    pages = [engine.manager.block_pool.get_cached_block(key, [0]) for key in low.block_hashes]
    assert pages[-2] is not None
    assert pages[-1] is None
    driver.run()
    assert (low.num_output_tokens, high.num_output_tokens) == (200, 290)


@KINDS
@pytest.mark.parametrize("mode", ["fcfs", "priority", "async"])
@pytest.mark.parametrize("seed", range(4))
def test_any_history_reads_only_its_own_keys(sparsity, mode, seed):
    """Arrivals, aborts, forced resets, preemptions, n = 2 and salts in a pool that is too small."""
    engine = small_engine(
        sparsity,
        requests=2,
        snapshots=9,
        scheduling_policy="priority" if mode == "priority" else "fcfs",
        async_scheduling=mode == "async",
        max_num_batched_tokens=(64, 128, 300, 1_024)[seed],
    )
    driver = Driver(engine, depth=2 if mode == "async" else 1)
    random = Random(seed)
    made = prompts(seed, 60)
    alive: list[str] = []
    for index, prompt in enumerate(made):
        for sibling in range(random.choice([1, 1, 1, 2])):
            name = f"{sibling}_{index}"
            engine.add(
                name,
                prompt,
                max_tokens=random.choice([1, 5, 40, 200]),
                priority=random.randrange(3),
                cache_salt=random.choice([None, None, "salt"]),
                sampling={"prompt_logprobs": 1} if random.random() < 0.1 else None,
            )
            alive.append(name)
        for _ in range(random.randrange(12)):
            driver.step()
        if random.random() < 0.2:
            engine.scheduler.finish_requests(random.choice(alive), RequestStatus.FINISHED_ABORTED)
        if random.random() < 0.05:
            engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    driver.run(20_000)
    assert driver.worker.restored > 3
    assert driver.worker.stored > 20
    assert mode == "async" or driver.preempted > 0
