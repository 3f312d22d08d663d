"""Held blocks by class on their way from the scheduler to the front end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.v1.metrics.stats import SchedulerStats

from tests.kv_cache.caches import Engine, layout_of, two_bins
from vllm_duo import metrics
from vllm_duo.compat import scheduler_stats
from vllm_duo.compat.scheduler_stats import held_blocks
from vllm_duo.config import DuoConfig, resolve
from vllm_duo.heads import HeadPattern
from vllm_duo.server_plan import ServerPlan

LAYOUT = two_bins()  # of 3 blocks each
IDLE = {
    "vllm_duo:retrieval_blocks": 0,
    "vllm_duo:streaming_blocks": 0,
    "vllm_duo:block_bytes": LAYOUT.block_bytes,
    "vllm_duo:pool_blocks": 199,
}


def running(num_tokens: int) -> Engine:
    engine = Engine(LAYOUT, num_blocks=200)
    for name in ("a", "b"):
        engine.step(engine.request(name, num_tokens), num_tokens)
    return engine


class TestHeldBlocks:
    def test_nothing_is_held_at_first(self):
        assert held_blocks(Engine(LAYOUT, num_blocks=200).manager) == IDLE

    @pytest.mark.parametrize(
        ("num_tokens", "retrieval", "streaming"), [(1, 1, 2), (16, 1, 2), (17, 2, 4), (160, 10, 6)]
    )
    def test_each_class_is_counted(self, num_tokens, retrieval, streaming):
        assert held_blocks(running(num_tokens).manager) == IDLE | {
            "vllm_duo:retrieval_blocks": 2 * retrieval,
            "vllm_duo:streaming_blocks": 2 * streaming,
        }

    def test_they_are_what_the_pool_misses(self):
        engine = running(160)
        counts = held_blocks(engine.manager)
        held = counts["vllm_duo:retrieval_blocks"] + counts["vllm_duo:streaming_blocks"]
        assert held + engine.pool.get_num_free_blocks() == counts["vllm_duo:pool_blocks"]

    def test_finished_requests_count_no_more(self):
        engine = running(160)
        for name in ("a", "b"):
            engine.manager.free(engine.request(name, 1))
        assert held_blocks(engine.manager) == IDLE

    def test_only_streaming_heads(self):
        engine = Engine(layout_of((0, 0), (2, 2)))
        engine.step(engine.request("a", 160), 160)
        counts = held_blocks(engine.manager)
        assert counts["vllm_duo:retrieval_blocks"] == 0
        assert counts["vllm_duo:streaming_blocks"] > 0

    def test_model_without_streaming_heads_has_none(self):
        assert held_blocks(Engine(layout_of((2, 2), (0, 0))).manager) == {}


class FakeScheduler:
    """vLLM's Scheduler as far as the patch looks at it."""

    def __init__(self, kv_cache_manager, stats):
        self.kv_cache_manager, self.stats = kv_cache_manager, stats

    def make_stats(self, *args, **kwargs):
        self.given = args, kwargs
        return self.stats


@pytest.fixture
def scheduler_class():
    module = SimpleNamespace(Scheduler=type("Scheduler", (FakeScheduler,), {}))
    scheduler_stats.patch(module)
    return module.Scheduler


class TestMakeStats:
    def test_counts_travel_beside_vllms_own(self, scheduler_class):
        stats = SchedulerStats(num_kv_fetch_reqs_by_stage={"in_progress": 3})
        scheduler = scheduler_class(running(160).manager, stats)
        assert scheduler.make_stats(1, perf_stats=2) is stats
        assert scheduler.given == ((1,), {"perf_stats": 2})
        assert stats.num_kv_fetch_reqs_by_stage == {"in_progress": 3} | held_blocks(
            scheduler.kv_cache_manager
        )

    def test_statistics_switched_off_stay_off(self, scheduler_class):
        assert scheduler_class(running(160).manager, None).make_stats() is None

    def test_other_models_send_nothing(self, scheduler_class):
        stats = SchedulerStats()
        scheduler_class(Engine(layout_of((2,), (0,))).manager, stats).make_stats()
        assert stats.num_kv_fetch_reqs_by_stage == {}


class TestStatLogger:
    @pytest.fixture
    def stat_logger(self, monkeypatch):
        # A VllmConfig of a duo server says no more here than its pattern and settings.
        pattern = HeadPattern.uniform(2, 3)
        plan = ServerPlan(pattern, resolve(DuoConfig(), pattern))
        monkeypatch.setattr(metrics, "resolve_plan", lambda _: plan)
        return metrics.DuoStatLogger(SimpleNamespace())

    def gauge(self, name, **labels):
        from prometheus_client import REGISTRY

        return REGISTRY.get_sample_value(f"vllm_duo:{name}", {"engine": "0", **labels})

    def record(self, stat_logger) -> dict[str, int]:
        counts = held_blocks(running(160).manager)
        stats = SchedulerStats(num_kv_fetch_reqs_by_stage={"in_progress": 0} | counts)
        stat_logger.record(stats, None)
        return stats.num_kv_fetch_reqs_by_stage

    @pytest.mark.parametrize(("name", "blocks"), [("retrieval", 20), ("streaming", 12)])
    def test_counts_are_published(self, stat_logger, name, blocks):
        self.record(stat_logger)
        assert self.gauge("held_blocks", **{"class": name}) == blocks
        assert self.gauge("held_bytes", **{"class": name}) == blocks * LAYOUT.block_bytes

    def test_vllms_own_loggers_do_not_see_them(self, stat_logger):
        # vLLM logs the stages of KV fetches as soon as any of these counts is not 0.
        assert self.record(stat_logger) == {"in_progress": 0}

    def test_step_without_counts_is_passed_over(self, stat_logger):
        self.record(stat_logger)
        stat_logger.record(SchedulerStats(), None)
        stat_logger.record(None, None)
        assert self.gauge("held_blocks", **{"class": "retrieval"}) == 20
