"""HeadPattern.select and HeadSelection: which heads stream, and the hash of the choice."""

import copy
import hashlib
import pickle
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_duo.heads import HeadPattern, HeadSelection
from vllm_duo.heads.discovery import PUBLISHED, list_shipped

GOLDEN_HASHES = {  # at sparsity 0.5
    "Llama-2-7B-32K-Instruct": "9bbcbfeefe6a8b19",
    "Llama-3-8B-Instruct-Gradient-1048k": "56f5aae30ec768ad",
    "Meta-Llama-3.1-8B-Instruct": "f154682e8de4f03c",
    "Mistral-7B-Instruct-v0.2": "20186df097958753",
}


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller checks the whole text
        call(*args, **kwargs)
    return str(caught.value)


def slow_streaming_set(values, sparsity: float) -> set[tuple[int, int]]:
    """Oracle: pick the next streaming head n times, looking at every head each time."""
    heads = {
        (layer, head): min(max(value, 0.0), 1.0)
        for layer, row in enumerate(values)
        for head, value in enumerate(row)
    }
    streaming: set[tuple[int, int]] = set()
    for _ in range(int(sparsity * len(heads) + 0.5)):
        left = Counter(layer for layer, _ in heads.keys() - streaming)
        streaming.add(
            min(
                heads.keys() - streaming,
                key=lambda at: (heads[at], -left[at[0]], at[0], at[1]),
            )
        )
    return streaming


def streaming_set(selection: HeadSelection) -> set[tuple[int, int]]:
    return {(int(layer), int(head)) for layer, head in np.argwhere(~selection.retrieval)}


# Few distinct values, so that ties are the rule; also some just outside [0, 1].
tables = st.integers(1, 4).flatmap(
    lambda width: st.lists(
        st.lists(
            st.sampled_from([-0.01, -1e-5, -0.0, 0.0, 0.25, 0.5, 0.99609375, 1.0, 1.004, 1.01]),
            min_size=width,
            max_size=width,
        ),
        min_size=1,
        max_size=5,
    )
)


class TestSelectBySparsity:
    @settings(derandomize=True, deadline=None)
    @given(values=tables, sparsity=st.floats(0, 1))
    def test_equals_the_slow_oracle(self, values, sparsity):
        selection = HeadPattern(np.array(values)).select(sparsity=sparsity)
        assert streaming_set(selection) == slow_streaming_set(values, sparsity)

    @pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
    @pytest.mark.parametrize("name", list_shipped())
    def test_published_ties_break_as_in_the_slow_oracle(self, name, sparsity):
        pattern = HeadPattern.load(PUBLISHED / name)
        expected = slow_streaming_set(pattern.values.tolist(), sparsity)
        assert streaming_set(pattern.select(sparsity=sparsity)) == expected

    @pytest.mark.parametrize(
        ("sparsity", "streaming"), [(0.0, 0), (0.1, 1), (0.5, 5), (0.55, 5), (0.94, 8), (1.0, 9)]
    )
    def test_streams_floor_of_share_times_heads_plus_half(self, sparsity, streaming):
        selection = HeadPattern.uniform(3, 3, 0.5).select(sparsity=sparsity)
        assert np.count_nonzero(~selection.retrieval) == streaming

    def test_lowest_values_stream(self):
        pattern = HeadPattern(np.array([[0.9, 0.1], [0.2, 0.8]]))
        assert pattern.select(sparsity=0.5).retrieval.tolist() == [[True, False], [False, True]]

    def test_tie_goes_to_the_layer_with_most_retrieval_heads_left(self):
        pattern = HeadPattern(np.array([[0.1, 0.1, 0.5], [0.9, 0.9, 0.5]]))
        assert streaming_set(pattern.select(sparsity=0.5)) == {(0, 0), (0, 1), (1, 2)}

    def test_tie_with_equal_layers_goes_to_the_lower_layer_then_the_lower_head(self):
        pattern = HeadPattern.uniform(2, 2, 0.5)
        assert streaming_set(pattern.select(sparsity=0.25)) == {(0, 0)}

    def test_ties_are_taken_one_head_at_a_time(self):
        pattern = HeadPattern.uniform(3, 4, 1.0)
        selection = pattern.select(sparsity=0.5)
        assert selection.retrieval.sum(axis=1).tolist() == [2, 2, 2]

    def test_values_below_zero_tie_with_zero(self):
        pattern = HeadPattern(np.array([[0.0, 0.0], [0.5, -0.005]]))
        assert streaming_set(pattern.select(sparsity=0.25)) == {(0, 0)}

    def test_values_above_one_tie_with_one(self):
        pattern = HeadPattern(np.array([[1.005, 0.0], [1.0, 1.0]]))
        assert streaming_set(pattern.select(sparsity=0.5)) == {(0, 1), (1, 0)}

    def test_more_sparsity_only_adds_streaming_heads(self):
        pattern = HeadPattern.load(PUBLISHED / "Mistral-7B-Instruct-v0.2")
        shares = [step / 16 for step in range(17)]
        chosen = [streaming_set(pattern.select(sparsity=share)) for share in shares]
        assert all(less <= more for less, more in pairwise(chosen))


class TestSelectByThreshold:
    @settings(derandomize=True, deadline=None)
    @given(values=tables, threshold=st.floats(0, 1))
    def test_a_clipped_value_at_or_above_it_is_a_retrieval_head(self, values, threshold):
        selection = HeadPattern(np.array(values)).select(threshold=threshold)
        expected = [[min(max(value, 0.0), 1.0) >= threshold for value in row] for row in values]
        assert selection.retrieval.tolist() == expected

    def test_zero_keeps_heads_with_negative_values(self):
        assert HeadPattern.uniform(2, 2, -0.005).select(threshold=0).sparsity == 0.0

    def test_one_keeps_heads_at_one(self):
        pattern = HeadPattern(np.array([[1.0, 0.999]]))
        assert pattern.select(threshold=1.0).retrieval.tolist() == [[True, False]]


class TestSelectArguments:
    def test_neither_is_refused(self):
        assert error_of(HeadPattern.uniform(1, 1).select) == (
            "select: expected exactly one of sparsity and threshold, got neither: "
            "pass for example sparsity=0.5"
        )

    def test_both_are_refused(self):
        message = error_of(HeadPattern.uniform(1, 1).select, sparsity=0.5, threshold=0.5)
        assert "expected exactly one of sparsity and threshold, got both" in message

    @pytest.mark.parametrize("setting", ["sparsity", "threshold"])
    @pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), True, "0.5"])
    def test_anything_but_a_number_from_0_to_1_is_refused(self, setting, value):
        assert error_of(HeadPattern.uniform(1, 1).select, **{setting: value}) == (
            f"{setting}: expected a number from 0 to 1, got {value!r}: "
            f"pass for example {setting}=0.5"
        )

    def test_integers_and_numpy_floats_are_taken(self):
        pattern = HeadPattern.uniform(1, 2)
        assert pattern.select(sparsity=1).sparsity == 1.0
        assert pattern.select(sparsity=np.float32(0.5)).sparsity == 0.5


class TestSelection:
    @pytest.mark.parametrize("name", list_shipped())
    def test_mask_hash_of_published_pattern_at_half(self, name):
        pattern = HeadPattern.load(PUBLISHED / name)
        mask = bytearray(b"\1" * pattern.values.size)
        for layer, head in slow_streaming_set(pattern.values.tolist(), 0.5):
            mask[layer * pattern.num_kv_heads + head] = 0
        shape = b"".join(size.to_bytes(4, "little") for size in pattern.values.shape)
        expected = hashlib.sha256(shape + mask).hexdigest()[:16]
        assert pattern.select(sparsity=0.5).mask_hash == expected == GOLDEN_HASHES[name]

    def test_mask_hash_does_not_depend_on_memory_order(self):
        mask = np.array([[True, False, True], [False, False, True]])
        assert HeadSelection(np.asfortranarray(mask)).mask_hash == HeadSelection(mask).mask_hash

    def test_mask_hash_tells_shapes_apart(self):
        mask = np.ones((2, 3), dtype=bool)
        assert HeadSelection(mask).mask_hash != HeadSelection(mask.T).mask_hash

    def test_sparsity_is_the_actual_share(self):
        selection = HeadPattern.uniform(3, 3).select(sparsity=0.5)
        assert Fraction(selection.sparsity) == Fraction(5 / 9)

    def test_shape_is_that_of_the_pattern(self):
        selection = HeadPattern.uniform(3, 2).select(sparsity=0.5)
        assert (selection.num_layers, selection.num_kv_heads) == (3, 2)

    def test_equal_masks_are_equal_and_hash_alike(self):
        one, two = (HeadPattern.uniform(2, 2).select(sparsity=0.5) for _ in range(2))
        assert (one, hash(one)) == (two, hash(two))

    def test_mask_cannot_be_written(self):
        selection = HeadPattern.uniform(2, 2).select(sparsity=0.5)
        with pytest.raises(ValueError, match="read-only"):
            selection.retrieval[0, 0] = True
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            selection.retrieval.flags.writeable = True

    def test_mask_is_a_copy(self):
        mask = np.ones((2, 2), dtype=bool)
        selection = HeadSelection(mask)
        mask[0, 0] = False
        assert selection.retrieval.all()

    @pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_clone_is_equal_and_stays_read_only(self, clone):
        selection = HeadPattern.uniform(2, 2).select(sparsity=0.5)
        assert clone(selection) == selection
        assert not clone(selection).retrieval.flags.writeable

    @pytest.mark.parametrize("mask", [np.ones(3, bool), np.ones((0, 2), bool), np.ones((2, 2))])
    def test_anything_but_a_bool_table_is_refused(self, mask):
        assert error_of(HeadSelection, mask) == (
            "retrieval mask: expected a bool array [layers, KV heads] with at least one head, "
            f"got {mask.dtype} {list(mask.shape)}: pass one flag per KV head"
        )


class TestSomeLayers:
    """Layers that the pattern does not choose in: all of their heads stream."""

    VALUES = np.array([[1.0, 1.0], [0.2, 0.9], [1.0, 1.0], [0.8, 0.1]])

    def test_share_is_of_the_layers_that_are_cut(self):
        selection = HeadPattern(self.VALUES).select(sparsity=0.5, layers=[1, 3])
        assert selection.retrieval.tolist() == [
            [False, False],
            [False, True],
            [False, False],
            [True, False],
        ]
        assert selection.sparsity == 0.75

    def test_threshold(self):
        selection = HeadPattern(self.VALUES).select(threshold=0.85, layers=[0, 1])
        assert selection.retrieval.tolist() == [
            [True, True],
            [False, True],
            [False] * 2,
            [False] * 2,
        ]

    def test_all_layers_are_as_none_named(self):
        pattern = HeadPattern(self.VALUES)
        assert pattern.select(sparsity=0.5, layers=range(4)) == pattern.select(sparsity=0.5)

    def test_balanced(self):
        selection = HeadPattern(self.VALUES).select(sparsity=0.5, balance_ranks=2, layers=[1, 3])
        assert selection.retrieval[[1, 3]].sum(0).tolist() == [1, 1]

    def test_no_layer(self):
        assert HeadPattern(self.VALUES).select(sparsity=0.0, layers=[]).sparsity == 1.0
