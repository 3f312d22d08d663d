"""RingManager through vLLM's own KVCacheManager, coordinators and start-up arithmetic."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import CacheConfig
from vllm.v1.core import kv_cache_utils

from tests.kv_cache.caches import Engine, config_of, layout_of, specs_of, two_bins
from vllm_duo import plugin
from vllm_duo.compat.snapshot_orders import take_orders
from vllm_duo.kv_cache.capacity import Capacity
from vllm_duo.kv_cache.layout import Layout
from vllm_duo.kv_cache.manager import RingManager
from vllm_duo.kv_cache.snapshot_manager import SnapshotManager
from vllm_duo.kv_cache.spec import StreamingSpec

plugin.register()

MIXED = two_bins()  # each as wide as the retrieval group
STREAMING = layout_of((0, 0), (2, 2))
RETRIEVAL = layout_of((2, 2), (0, 0))
LAYOUTS = pytest.mark.parametrize("layout", [MIXED, STREAMING], ids=["mixed", "only streaming"])


class TestBlocks:
    @LAYOUTS
    def test_chunks_claim_what_the_layout_says(self, layout):
        engine = Engine(layout)
        request = engine.request("a", 1000)
        for chunk in (7, 9, 1, 15, 300, 668):
            assert engine.step(request, chunk)
            num_tokens = request.num_computed_tokens
            counts = [len(table) for table in engine.tables(request)]
            paged = [math.ceil(num_tokens / layout.block_size)] if layout.has_retrieval else []
            assert counts == paged + [layout.span.blocks(num_tokens)] * len(layout.bins)
            assert sum(counts) == layout.blocks(num_tokens)
            engine.check([request])

    @LAYOUTS
    def test_chunks_do_not_change_the_count(self, layout):
        engine = Engine(layout)
        one, many = engine.request("one", 500), engine.request("many", 500)
        engine.step(one, 500)
        for _ in range(5):
            engine.step(many, 100)
        assert list(map(len, engine.tables(one))) == list(map(len, engine.tables(many)))

    def test_streaming_tables_stay_while_the_request_grows(self):
        engine = Engine(MIXED)
        request = engine.request("a", 1000)
        engine.step(request, 100)
        before = engine.tables(request)[1:]
        engine.step(request, 900)
        assert engine.tables(request)[1:] == before

    @LAYOUTS
    def test_finished_request_returns_everything(self, layout):
        engine = Engine(layout)
        request = engine.request("a", 300)
        engine.step(request, 300)
        engine.manager.free(request)
        assert engine.pool.get_num_free_blocks() == 199
        engine.check([request])

    @LAYOUTS
    def test_preempted_request_comes_back(self, layout):
        engine = Engine(layout)
        request = engine.request("a", 300)
        engine.step(request, 300)
        engine.preempt(request)
        assert engine.step(request, 5)
        assert sum(map(len, engine.tables(request))) == layout.blocks(5)
        engine.check([request])

    @LAYOUTS
    def test_request_without_blocks_can_be_aborted(self, layout):
        engine = Engine(layout)
        engine.manager.free(engine.request("a", 300))
        engine.check([])

    @settings(max_examples=40)
    @given(
        st.sampled_from([MIXED, STREAMING]),
        st.lists(
            st.tuples(st.integers(0, 3), st.sampled_from(["grow"] * 4 + ["preempt", "finish"])),
            max_size=40,
        ),
        st.integers(1, 90),
    )
    def test_any_history_keeps_the_accounts(self, layout, history, chunk):
        engine = Engine(layout, num_blocks=40)
        requests = [engine.request(str(index), 4000) for index in range(4)]
        for index, action in history:
            request = requests[index]
            if action != "grow":
                engine.preempt(request)
            elif request.num_computed_tokens + chunk <= request.num_tokens:
                engine.step(request, chunk)
            engine.check(requests)
        for request in requests:
            engine.preempt(request)
        assert engine.pool.get_num_free_blocks() == 39


class TestPrefixHits:
    def hits_of_a_repeated_prompt(self, layout: Layout) -> int:
        engine = Engine(layout, enable_caching=True)
        engine.step(engine.request("first", 320), 320)
        take_orders(engine.manager)
        again = engine.request("again", 320)
        _, num_hits, _ = engine.manager.get_computed_blocks(again)
        assert engine.step(again, 320 - num_hits)
        return num_hits

    @pytest.mark.parametrize(
        "layout", [MIXED, STREAMING, RETRIEVAL], ids=["mixed", "only streaming", "only retrieval"]
    )
    def test_snapshots_serve_what_full_blocks_serve(self, layout):
        assert self.hits_of_a_repeated_prompt(layout) == 304

    @pytest.mark.parametrize("enable_caching", [True, False])
    def test_vllms_flag_chooses_the_manager(self, enable_caching):
        managers = Engine(MIXED, enable_caching=enable_caching).manager.coordinator
        expected = SnapshotManager if enable_caching else RingManager
        assert [type(m) for m in managers.single_type_managers[1:]] == [expected] * 2

    def test_a_ring_serves_none(self):
        assert RingManager.find_longest_cache_hit([b"x"], 16, [1, 2], None, None, False, 16) == (
            ([], []),
            0,
        )

    def test_every_spec_takes_part_in_the_hit_search(self):
        groups = config_of(MIXED, 10).kv_cache_groups
        assert all(group.kv_cache_spec.prefix_cacheable for group in groups)

    @pytest.mark.parametrize("num_hits", [16, 160])
    def test_resuming_at_an_unheld_prefix_is_refused(self, num_hits):
        engine = Engine(MIXED)
        with pytest.raises(RuntimeError, match="request a was to resume at a prefix"):
            engine.manager.allocate_slots(
                engine.request("a", 320), 16, num_new_computed_tokens=num_hits
            )
        engine.check([])


class TestAdmission:
    @LAYOUTS
    @pytest.mark.parametrize("num_tokens", [1, 20, 320, 1000])
    def test_exactly_enough_is_admitted(self, layout, num_tokens):
        engine = Engine(layout, num_blocks=1 + layout.blocks(num_tokens))
        request = engine.request("a", num_tokens)
        assert engine.step(request, 1, whole=True)
        assert num_tokens == 1 or engine.step(request, num_tokens - 1)
        assert engine.pool.get_num_free_blocks() == 0

    @LAYOUTS
    @pytest.mark.parametrize("num_tokens", [1, 20, 320, 1000])
    def test_one_block_less_is_refused(self, layout, num_tokens):
        engine = Engine(layout, num_blocks=layout.blocks(num_tokens))
        request = engine.request("a", num_tokens)
        assert not engine.step(request, 1, whole=True)
        assert engine.tables(request) == tuple([] for _ in engine.tables(request))
        engine.check([request])

    @LAYOUTS
    def test_as_many_requests_as_the_layout_promises(self, layout):
        engine = Engine(layout, num_blocks=200)
        pool_bytes = 200 * layout.block_bytes
        admitted = 0
        while engine.step(engine.request(str(admitted), 320), 320, whole=True):
            admitted += 1
        assert admitted == int(Capacity.of_bytes(layout, pool_bytes).concurrent_requests(320))


def server(max_model_len: int) -> SimpleNamespace:
    """The fields of a VllmConfig that vLLM's start-up arithmetic reads."""
    cache = CacheConfig(block_size=16)
    cache.kv_cache_layout = "BLHNC"  # the backend's, resolved by the engine core
    parallel = SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1)
    return SimpleNamespace(
        cache_config=cache,
        parallel_config=parallel,
        model_config=SimpleNamespace(
            max_model_len=max_model_len, original_max_model_len=max_model_len
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        num_prefill_lookahead_tokens=0,
    )


class TestStartUp:
    @LAYOUTS
    def test_the_pool_is_counted_in_planned_blocks(self, layout):
        (config,) = kv_cache_utils.get_kv_cache_configs(
            server(1000), [specs_of(layout)], [100 * layout.block_bytes + 1]
        )
        assert config.num_blocks == 100
        assert {tensor.size for tensor in config.kv_cache_tensors} == {100 * layout.block_bytes}

    @LAYOUTS
    @pytest.mark.parametrize("max_model_len", [10, 1000, 4096])
    def test_concurrency_counts_both_classes(self, layout, max_model_len):
        for_server = server(max_model_len)
        (config,) = kv_cache_utils.get_kv_cache_configs(
            for_server, [specs_of(layout)], [1000 * layout.block_bytes]
        )
        figure = kv_cache_utils.get_max_concurrency_for_kv_cache_config(for_server, config)
        # vLLM counts its null block; the layout's own figure does not.
        assert figure == 1000 / layout.blocks(max_model_len)
        ours = Capacity.of_bytes(layout, 1000 * layout.block_bytes).concurrent_requests(
            max_model_len
        )
        assert ours == pytest.approx(figure * 999 / 1000)

    def test_exactly_enough_for_one_request_starts(self):
        blocks = MIXED.blocks(1000) + 1
        (config,) = kv_cache_utils.get_kv_cache_configs(
            server(1000), [specs_of(MIXED)], [blocks * MIXED.block_bytes]
        )
        assert config.num_blocks == blocks

    def test_too_small_a_pool_names_the_largest_length_that_fits(self):
        blocks = MIXED.blocks(1000) + 1
        fits = max(n for n in range(1000) if MIXED.blocks(n) <= blocks - 2)
        with pytest.raises(ValueError, match=f"estimated maximum model length is {fits}"):
            kv_cache_utils.get_kv_cache_configs(
                server(1000), [specs_of(MIXED)], [(blocks - 1) * MIXED.block_bytes]
            )

    @pytest.mark.parametrize(
        ("max_model_len", "blocks"), [(100, 7), (304, 19), (305, 20), (9999, 20)]
    )
    def test_a_ring_is_sized_by_its_span(self, max_model_len, blocks):
        layout = layout_of((1,), (1,), sink_size=64, recent_size=256)
        (spec,) = (s for s in specs_of(layout).values() if isinstance(s, StreamingSpec))
        assert spec.max_memory_usage_bytes(server(max_model_len)) == blocks * spec.page_size_bytes
        assert spec.max_num_blocks_per_req(server(max_model_len), max_model_len) == 20
