"""What each class holds, wastes and hits, on its way from the scheduler to the front end."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from vllm.v1.metrics.stats import SchedulerStats

from tests.kv_cache.caches import Engine, layout_of, two_bins
from vllm_duo import metrics
from vllm_duo.compat import scheduler_stats
from vllm_duo.compat.scheduler_stats import (
    PREFIX,
    held_blocks,
    pool_waste_ppm,
    streaming_hits,
)
from vllm_duo.compat.snapshot_orders import take_orders
from vllm_duo.config import DuoConfig, resolve
from vllm_duo.heads import HeadPattern
from vllm_duo.server_plan import ServerPlan

LAYOUT = two_bins()  # of 3 blocks each
WIDE = replace(LAYOUT, block_bytes=LAYOUT.block_bytes + 1024)  # than any group
IDLE = {
    "vllm_duo:retrieval_blocks": 0,
    "vllm_duo:streaming_blocks": 0,
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
    """vLLM's Scheduler as far as the patch looks at it, with requests of these lengths."""

    def __init__(self, kv_cache_manager, stats, layout=WIDE, lengths=(160, 160)):
        self.kv_cache_manager, self.stats, self.duo_layout = kv_cache_manager, stats, layout
        self.running = [SimpleNamespace(num_computed_tokens=n) for n in lengths]

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
        sent = stats.num_kv_fetch_reqs_by_stage
        assert sent == (
            {"in_progress": 3}
            | held_blocks(scheduler.kv_cache_manager)
            | streaming_hits(scheduler.kv_cache_manager)
            | {"vllm_duo:block_bytes": WIDE.block_bytes}
            | {"vllm_duo:waste_ppm": round(1e6 * WIDE.waste(160))}
        )

    def test_statistics_switched_off_stay_off(self, scheduler_class):
        assert scheduler_class(running(160).manager, None).make_stats() is None

    def test_other_models_send_nothing(self, scheduler_class):
        stats = SchedulerStats()
        manager = Engine(layout_of((2,), (0,))).manager
        scheduler_class(manager, stats, layout=None).make_stats()
        assert stats.num_kv_fetch_reqs_by_stage == {}


class TestWaste:
    def test_it_is_that_of_the_running_requests(self):
        scheduler = FakeScheduler(None, None, lengths=(160, 33))
        assert pool_waste_ppm(scheduler) == round(1e6 * WIDE.pool_waste([160, 33])) > 0

    def test_an_idle_pool_wastes_nothing(self):
        assert pool_waste_ppm(FakeScheduler(None, None, lengths=())) == 0

    def test_it_is_found_anew_after_a_second(self, monkeypatch):
        now = [100.0]
        monkeypatch.setattr(scheduler_stats, "monotonic", lambda: now[0])
        scheduler = FakeScheduler(None, None)
        first = pool_waste_ppm(scheduler)
        scheduler.running = FakeScheduler(None, None, lengths=(33,)).running
        now[0] += 0.9
        assert pool_waste_ppm(scheduler) == first > 0
        now[0] += 0.2
        assert pool_waste_ppm(scheduler) == round(1e6 * WIDE.waste(33)) != first

    def test_the_last_to_go_leaves_none_behind(self, monkeypatch):
        monkeypatch.setattr(scheduler_stats, "monotonic", lambda: 100.0)
        scheduler = FakeScheduler(None, None)
        running = scheduler.running
        first = pool_waste_ppm(scheduler)
        scheduler.running = []
        assert pool_waste_ppm(scheduler) == 0
        scheduler.running = running[:1]
        assert pool_waste_ppm(scheduler) == round(1e6 * WIDE.waste(160)) > 0
        assert first > 0


class TestStreamingHits:
    def counts(self, engine):
        return tuple(streaming_hits(engine.manager).values())

    def test_a_second_request_resumes_at_the_firsts_snapshot(self):
        engine = Engine(LAYOUT, enable_caching=True)
        engine.step(engine.request("a", 160), 160)
        take_orders(engine.manager)
        hits, tokens, stored = self.counts(engine)
        assert (hits, tokens) == (0, 0)
        assert stored > 0
        again = engine.request("b", 160)
        engine.step(again, 8)
        assert self.counts(engine)[:2] == (1, engine.manager.get_computed_blocks(again)[1])

    def test_without_prefix_caching_they_are_0(self):
        assert self.counts(running(160)) == (0, 0, 0)


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

    def record(self, stat_logger, number=3) -> dict[str, int]:
        counts = held_blocks(running(160).manager) | {"vllm_duo:waste_ppm": 12_500}
        counts["vllm_duo:block_bytes"] = LAYOUT.block_bytes
        counts |= {PREFIX + name: number for name in scheduler_stats.COUNTERS}
        stats = SchedulerStats(num_kv_fetch_reqs_by_stage={"in_progress": 0} | counts)
        stat_logger.record(stats, None)
        return stats.num_kv_fetch_reqs_by_stage

    @pytest.mark.parametrize(("name", "blocks"), [("retrieval", 20), ("streaming", 12)])
    def test_counts_are_published(self, stat_logger, name, blocks):
        self.record(stat_logger)
        assert self.gauge("held_blocks", **{"class": name}) == blocks
        assert self.gauge("held_bytes", **{"class": name}) == blocks * LAYOUT.block_bytes

    def test_waste_is_a_share(self, stat_logger):
        self.record(stat_logger)
        assert self.gauge("pool_waste") == 0.0125

    @pytest.mark.parametrize("name", scheduler_stats.COUNTERS)
    def test_counters_follow_the_engines(self, stat_logger, name):
        before = self.gauge(f"{name}_total")
        for number in (3, 3, 10):
            self.record(stat_logger, number)
        assert self.gauge(f"{name}_total") == before + 10

    def test_a_new_engine_counts_from_0(self, stat_logger):
        self.record(stat_logger, 7)
        before = self.gauge("streaming_snapshots_total")
        self.record(metrics.DuoStatLogger(SimpleNamespace()), 2)
        assert self.gauge("streaming_snapshots_total") == before + 2

    def test_vllms_own_loggers_do_not_see_them(self, stat_logger):
        # vLLM logs the stages of KV fetches as soon as any of these counts is not 0.
        assert self.record(stat_logger) == {"in_progress": 0}

    def test_step_without_counts_is_passed_over(self, stat_logger):
        self.record(stat_logger)
        stat_logger.record(SchedulerStats(), None)
        stat_logger.record(None, None)
        assert self.gauge("held_blocks", **{"class": "retrieval"}) == 20
