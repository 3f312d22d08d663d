"""Any history of requests under vLLM's own scheduler: right reads, sound accounts, nothing lost."""

from __future__ import annotations

import os
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from benchmarks.simulated_config import ModelShape
from benchmarks.simulated_engine import make_engine
from tests.e2e.engine import write_pattern
from tests.kv_cache.histories import History
from vllm_duo.kv_cache import snapshot_manager

BLOCK_SIZE = 4
MAX_MODEL_LEN = 160
SOAK_STEPS = int(os.environ.get("VLLM_DUO_SOAK_STEPS", 1_000_000))
"""Steps of `make soak`; fewer for a look."""

STEPS_OF_A_CASE = 209
"""Enough for everything to happen that has to be survived."""

MASKS = {
    # One retrieval head and three streaming ones a layer: narrow blocks, so several bins.
    "several bins": [[True, False, False, False]] * 3,
    "one bin": [[True, True, True, False], [False] * 4, [True] * 4],
    "only streaming": [[False] * 4] * 2,
    # Rows of layers that slide are not read.
    "windows": [[True, True, False, False], [True] * 4, [False] * 4, [True] * 4],
    "only windows": [[True] * 4] * 2,
}
SIZES = {
    "several bins": (5, 11),
    "one bin": (3, 9),
    "only streaming": (0, 6),
    "windows": (3, 6),
    "only windows": (None, None),
}
EAGLE_HEAD = ModelShape(num_layers=1, num_heads=4, num_kv_heads=2, head_size=32, pattern="")
WINDOWS = {"windows": (21, (False, True, False, True)), "only windows": (13, (True, True))}
"""The model's own: tokens, and which layers slide."""


@pytest.fixture(scope="module", autouse=True)
def patterns(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patterns")
    snapshot_manager.ANSWER_INTERVAL, usual = 8, snapshot_manager.ANSWER_INTERVAL
    for name, mask in MASKS.items():
        PATTERNS[name] = str(write_pattern(folder / name.replace(" ", "-"), mask))
    yield
    snapshot_manager.ANSWER_INTERVAL = usual


PATTERNS: dict[str, str] = {}


def history_of(
    name: str,
    caching: bool,
    policy: str,
    chunk: int,
    interval: int,
    drafts: int = 0,
    events: bool = False,
    eagle: bool = False,
) -> History:
    """A new engine whose pool holds one and a half of its longest requests (of rings alone: all).

    With ``eagle`` an EAGLE head of one layer drafts, whose pages lie beside the retrieval heads'.
    """
    sink, recent = SIZES[name]
    window, slides = WINDOWS.get(name, (None, ()))
    shape = ModelShape(
        num_layers=len(MASKS[name]),
        num_heads=4,
        num_kv_heads=4,
        head_size=16,
        pattern="",
        sliding_window=window,
        slides=slides,
    )
    duo = {"sink_size": sink, "recent_size": recent, "snapshot_interval": interval}
    if slides and all(slides):
        duo |= {"pattern": None, "sparsity": None}

    def engine(pool_blocks: int, block_bytes: int):
        return make_engine(
            "duo",
            shape,
            pattern=PATTERNS[name],
            pool_bytes=pool_blocks * block_bytes,
            block_size=BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=6,
            max_num_batched_tokens=chunk,
            prefix_caching=caching,
            scheduling_policy=policy,
            num_speculative_tokens=drafts,
            eagle_head=EAGLE_HEAD if eagle else None,
            cache_events=events,
            duo=duo,
        )

    layout = engine(1000, 1 << 16).layout
    assert layout is not None
    # Rings alone never give a block back while others wait: snapshots need room beside all six.
    halves = 14 if name == "only windows" else 3
    return History(engine(1 + layout.blocks(MAX_MODEL_LEN) * halves // 2, layout.block_bytes))


class HistoryMachine(RuleBasedStateMachine):
    """Random rules over one engine."""

    @initialize(
        name=st.sampled_from(sorted(MASKS)),
        caching=st.sampled_from([True, True, False]),
        policy=st.sampled_from(["fcfs", "priority"]),
        chunk=st.sampled_from([16, 32, 200]),
        interval=st.sampled_from([4, 12, 40]),
        drafts=st.sampled_from([0, 0, 1, 3, 7]),
    )
    def start(self, **choices):
        self.history = history_of(**choices)

    @rule(
        base=st.integers(0, 7),
        shared=st.integers(0, 60),
        tail=st.integers(1, 40),
        answer=st.integers(1, 60),
        copies=st.sampled_from([1, 1, 1, 2, 3]),
        salt=st.sampled_from([0, 0, 0, 1]),
    )
    def add(self, **request):
        self.history.add(**request)

    @rule(count=st.integers(1, 8))
    def step(self, count):
        for _ in range(count):
            self.history.step()

    @rule(which=st.integers(0, 100))
    def abort(self, which):
        self.history.abort(which)

    @rule(running=st.booleans())
    def reset(self, running):
        self.history.reset(running)

    def teardown(self):
        if hasattr(self, "history"):
            self.history.drain()


HistoryMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestAnyHistory = HistoryMachine.TestCase


def run(history: History, random: Random, steps: int) -> None:
    """Drive a history at random, busier than hypothesis does."""
    while history.counts["steps"] < steps:
        chance = random.random()
        if chance < 0.25 and len(history.engine.scheduler.requests) < 12:
            history.add(
                random.randrange(8),
                random.choice([0, 20, 40, 60]),
                random.randrange(1, 41),
                random.randrange(1, 61),
                copies=random.choice([1, 1, 1, 3]),
                salt=random.choice([0, 0, 0, 1]),
            )
        elif chance < 0.28:
            history.abort(random.randrange(100))
        elif chance < 0.285:
            history.reset(random.random() < 0.5)
        else:
            history.step()
    history.drain()


CASES = [
    (name, caching, policy, chunk, drafts)
    for name in MASKS
    for caching in (True, False)
    for policy in ("fcfs", "priority")
    for chunk, drafts in ((16, 0), (48, 0), (16, 7), (48, 3))
    # What windows change has nothing to do with the policy, so each is driven with half of them.
    if name not in WINDOWS or (policy == "fcfs") == (chunk == 48)
]
BY_CASE = pytest.mark.parametrize(("name", "caching", "policy", "chunk", "drafts"), CASES)


@BY_CASE
def test_many_steps(name, caching, policy, chunk, drafts):
    history = history_of(name, caching, policy, chunk, interval=12, drafts=drafts)
    seed = f"{name} {caching} {policy} {chunk} {drafts}"
    run(history, Random(seed), STEPS_OF_A_CASE)
    counts = history.counts
    # What is to be survived has to happen.
    assert counts["preempted"] > 0 or name == "only windows"
    assert counts["aborted"] > 0
    assert (counts["hits"] > 0) == caching
    assert (counts["accepted"] > 10) == (counts["rejected"] > 10) == (drafts > 0)


@pytest.mark.soak
@pytest.mark.timeout(0)
@BY_CASE
def test_soak(name, caching, policy, chunk, drafts):
    history = history_of(name, caching, policy, chunk, interval=12, drafts=drafts)
    seed = f"soak {name} {caching} {policy} {chunk} {drafts}"
    run(history, Random(seed), SOAK_STEPS // len(CASES))
    assert history.counts["steps"] >= SOAK_STEPS // len(CASES)
