"""Layouts of models with sliding-window layers of their own, beside the pattern's streaming heads."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kv_cache.layouts import token_bytes
from vllm_duo.kv_cache.layout import KVShape, plan_layout
from vllm_duo.kv_cache.span import ANY_LENGTH


def joint_layouts(draw):
    """A model of a few layers, some with a window, in small blocks."""
    num_layers, heads = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    window = draw(st.integers(1, 90))
    windows = [window if draw(st.booleans()) else None for _ in range(num_layers)]
    retrieval = [0 if own else draw(st.integers(0, heads)) for own in windows]
    return plan_layout(
        KVShape(
            retrieval_heads=tuple(retrieval),
            streaming_heads=tuple(heads - n for n in retrieval),
            head_size=8,
            dtype_bytes=2,
            # A token of a head has 32 bytes; quantised, the retrieval heads' or all heads' 12.
            row_bytes=draw(st.sampled_from([None, 12])),
            streaming_quantised=draw(st.booleans()),
            skipped_layers=frozenset(at for at in range(num_layers) if draw(st.booleans())),
        ),
        block_size=draw(st.sampled_from([1, 4, 16, 32])),
        sink_size=draw(st.integers(0, 20)),
        recent_size=draw(st.integers(1, 60)),
        draft_size=draw(st.sampled_from([0, 3])),
        windows=windows,
        reference_tokens=draw(st.sampled_from([64, 500, 4000])),
    )


class TestWindows:
    """Layers with a sliding window of the model's own, beside the pattern's streaming heads."""

    @settings(max_examples=300, deadline=None)
    @given(layout=st.composite(joint_layouts)())
    def test_every_head_has_one_bin_of_its_kind_that_fits_a_block(self, layout):
        streaming = [at for at, heads in enumerate(layout.shape.streaming_heads) if heads]
        assert sorted(layer for layers in layout.bins for layer in layers) == streaming
        sizes = token_bytes(layout.shape)
        windows = layout.windows or [None] * len(layout.shape.streaming_heads)
        for layers, span in zip(layout.bins, layout.spans, strict=True):
            width = sum(sizes[layer][1] for layer in layers)
            assert width * span.block_size <= layout.block_bytes
            kept = {
                (layout.span.sink_size, layout.span.recent_size)
                if windows[layer] is None
                else (0, windows[layer])
                for layer in layers
            }
            assert kept == {(span.sink_size, span.recent_size)}
        assert layout.shape.paged_token_bytes * layout.block_size <= layout.block_bytes

    @settings(max_examples=300, deadline=None)
    @given(layout=st.composite(joint_layouts)(), num_tokens=st.integers(1, 5000))
    def test_figures_agree_with_sums_by_head(self, layout, num_tokens):
        shape = layout.shape
        windows = layout.windows or [None] * len(shape.streaming_heads)
        sizes = layout.span.sink_size + layout.span.recent_size
        layers = list(zip(token_bytes(shape), windows, strict=True))
        needed = sum(
            paged * num_tokens + ring * min(num_tokens, sizes if window is None else window)
            for (paged, ring), window in layers
        )
        assert layout.needed_bytes(num_tokens) == needed <= layout.held_bytes(num_tokens)
        assert 0 <= layout.waste(num_tokens) < 1
        constant = sum(ring * (sizes if window is None else window) for (_, ring), window in layers)
        assert layout.constant_bytes(shape) == constant
        longest = layout.max_request_tokens(layout.blocks(num_tokens) + 1)
        assert longest >= num_tokens
        if longest != ANY_LENGTH:
            assert layout.blocks(longest + 1) > layout.blocks(num_tokens)

    @settings(max_examples=100, deadline=None)
    @given(layout=st.composite(joint_layouts)())
    def test_full_attention_keeps_the_windows(self, layout):
        full = layout.full_attention
        windows = layout.windows or [None] * len(layout.shape.streaming_heads)
        own = zip(full.shape.streaming_heads, full.shape.retrieval_heads, windows, strict=True)
        for streaming, retrieval, window in own:
            assert (streaming if window is None else retrieval) == 0
        if layout.shape.streaming_quantised or layout.shape.row_bytes is None:
            assert full.needed_bytes(10_000) >= layout.needed_bytes(10_000)

    def test_worked_example_of_the_search(self):
        shape = KVShape(
            retrieval_heads=(0,) * 10 + (8,) * 2,
            streaming_heads=(16,) * 10 + (8,) * 2,
            head_size=128,
            dtype_bytes=2,
        )
        layout = plan_layout(
            shape,
            block_size=128,
            sink_size=64,
            recent_size=256,
            windows=(1024,) * 10 + (None,) * 2,
        )
        assert [(len(b), s.block_size) for b, s in zip(layout.bins, layout.spans, strict=True)] == [
            (5, 25),
            (5, 25),
            (2, 128),
        ]
        assert layout.block_bytes == 2048 * 512
        assert layout.blocks(32_768) == 256 + 2 * 41 + 3

    @pytest.mark.parametrize("num_tokens", [4096, 32_768, 131_072])
    @pytest.mark.parametrize(
        ("layers", "heads", "window", "every"),
        [
            (62, 16, 1024, 6),
            (48, 8, 1024, 6),
            (36, 8, 32_768, 4),
            (32, 32, 4096, 4),
            (24, 8, 128, 2),
        ],
    )
    def test_waste_of_real_shapes(self, layers, heads, window, every, num_tokens):
        """The targets of the shipped patterns: 3 % at 4k tokens; 1.5 % beyond, with fewer bins."""
        windows = tuple(None if (at + 1) % every == 0 else window for at in range(layers))
        retrieval = tuple(0 if own else heads // 2 for own in windows)
        layout = plan_layout(
            KVShape(
                retrieval_heads=retrieval,
                streaming_heads=tuple(heads - n for n in retrieval),
                head_size=128,
                dtype_bytes=2,
            ),
            block_size=128,
            sink_size=64,
            recent_size=256,
            windows=windows,
        )
        assert layout.waste(num_tokens) <= (0.03 if num_tokens == 4096 else 0.015)
        assert len(layout.bins) <= 3

    def test_ranks_share_the_bins(self):
        """Two ranks with unequal retrieval heads: one block table, all bins wide enough for either."""
        windows = (40, None, 40, None)
        mask = [[False] * 4, [True, True, False, True], [False] * 4, [False, False, True, False]]
        ranks = KVShape.split(mask, head_size=8, dtype_bytes=2, tensor_parallel_size=2)
        layout = plan_layout(ranks, block_size=16, sink_size=4, recent_size=9, windows=windows)
        for rank in ranks:
            for layers, span in zip(layout.bins, layout.spans, strict=True):
                heads = sum(rank.streaming_heads[layer] for layer in layers)
                assert heads * span.block_size * rank.token_bytes <= layout.block_bytes
        kept = [span.recent_size for span in layout.spans]
        assert dict(zip(layout.bins, kept, strict=True)) == {(0, 2): 40, (1, 3): 9}

    def test_retrieval_heads_in_a_layer_that_slides_are_refused(self):
        shape = KVShape(retrieval_heads=(1,), streaming_heads=(1,), head_size=8, dtype_bytes=2)
        with pytest.raises(
            ValueError, match=r"layers \[0\] have a sliding window of their own and"
        ):
            plan_layout(shape, block_size=16, sink_size=4, recent_size=9, windows=(8,))

    def test_windows_of_another_model_are_refused(self):
        shape = KVShape(retrieval_heads=(0,), streaming_heads=(1,), head_size=8, dtype_bytes=2)
        with pytest.raises(ValueError, match="expected one entry for each of 1 layers, got 2"):
            plan_layout(shape, block_size=16, sink_size=4, recent_size=9, windows=(8, 8))
