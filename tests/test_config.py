"""DuoConfig and resolve: what may be set, what wins, and how a mistake is told."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from vllm_duo.config import DuoConfig, ResolvedDuo, resolve
from vllm_duo.heads import HeadPattern

TOKENS = "a whole number of tokens from"
KEYS = "pattern, sparsity, threshold, sink_size, recent_size, snapshot_interval, "
KEYS += "streaming_cache_dtype, balance, retrieval_prefill, untested_gpu, untested_model_runner"


def read(**settings) -> DuoConfig:
    return DuoConfig.from_additional_config({"duo": settings})


def error_of(additional_config) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller checks the whole text
        DuoConfig.from_additional_config(additional_config)
    assert not isinstance(caught.value, ValidationError)
    return str(caught.value)


class TestReading:
    @pytest.mark.parametrize("additional_config", [None, {}, {"other": 1}, {"duo": {}}])
    def test_nothing_given_is_all_defaults(self, additional_config):
        assert DuoConfig.from_additional_config(additional_config) == DuoConfig()

    def test_every_key_is_read(self):
        settings = {"pattern": "x", "sparsity": 0.25, "sink_size": 4, "recent_size": 16}
        settings |= {"snapshot_interval": 512, "retrieval_prefill": "triton", "untested_gpu": True}
        settings |= {"balance": True, "untested_model_runner": True}
        settings |= {"streaming_cache_dtype": "model"}
        assert read(**settings).model_dump() == {**settings, "threshold": None}

    def test_threshold_is_read(self):
        assert read(threshold=0.75).threshold == 0.75

    def test_null_is_as_if_not_given(self):
        assert read(sparsity=0.5, threshold=None, pattern=None) == read(sparsity=0.5)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("sparsity", 0),
            ("sparsity", 1),
            ("threshold", 0.0),
            ("threshold", 1.0),
            ("sink_size", 0),
            ("recent_size", 1),
            ("sink_size", 2**30 - 1),
            ("recent_size", 64.0),
        ],
    )
    def test_limits_are_allowed(self, key, value):
        assert getattr(read(**{key: value}), key) == value

    def test_whole_float_becomes_int(self):
        assert isinstance(read(sink_size=64.0).sink_size, int)

    def test_config_is_frozen(self):
        with pytest.raises(ValidationError, match="frozen"):
            DuoConfig().sparsity = 0.1

    def test_direct_construction_refuses_two_cuts(self):
        with pytest.raises(ValidationError, match="expected at most one of them"):
            DuoConfig(sparsity=0.5, threshold=0.5)

    def test_import_needs_neither_torch_nor_vllm(self):
        code = "import sys, vllm_duo.config; sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
        root = Path(__file__).parents[1]
        assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


class TestMistakes:
    @pytest.mark.parametrize("bad", [-0.01, 1.01, float("nan"), float("inf"), True, "0.5", [0.5]])
    @pytest.mark.parametrize("key", ["sparsity", "threshold"])
    def test_share_outside_0_to_1_is_named(self, key, bad):
        assert error_of({"duo": {key: bad}}) == (
            f'"duo" in --additional-config: {key}: expected a number from 0 to 1, got {bad!r}'
        )

    @pytest.mark.parametrize("bad", [-1, 0.5, True, "64", 2**30, 1e300, float("nan"), [1]])
    @pytest.mark.parametrize(("key", "least"), [("sink_size", 0), ("recent_size", 1)])
    def test_size_that_is_no_allowed_whole_number_is_named(self, key, least, bad):
        assert error_of({"duo": {key: bad}}) == (
            f'"duo" in --additional-config: {key}: expected {TOKENS} {least} to 1073741823, '
            f"got {bad!r}"
        )

    def test_a_threshold_cannot_be_balanced(self):
        assert error_of({"duo": {"threshold": 0.5, "balance": True}}) == (
            '"duo" in --additional-config: balance and threshold: expected at most one of them, since '
            "a threshold streams no fixed share: set sparsity instead"
        )

    def test_recent_size_zero_is_refused(self):
        assert f"recent_size: expected {TOKENS} 1 to" in error_of({"duo": {"recent_size": 0}})

    @pytest.mark.parametrize("bad", ["", "  ", 3, ["x"], Path("x"), b"x"])
    def test_pattern_that_is_no_name_is_named(self, bad):
        assert error_of({"duo": {"pattern": bad}}) == (
            '"duo" in --additional-config: pattern: expected a pattern folder or the name of a '
            f"shipped pattern, got {bad!r}"
        )

    @pytest.mark.parametrize(
        ("key", "near"),
        [("sparcity", "sparsity"), ("sink-size", "sink_size"), ("Recent", "recent_size")],
    )
    def test_unknown_key_gets_the_nearest_one(self, key, near):
        assert error_of({"duo": {key: 1}}) == (
            f'"duo" in --additional-config: {key}: unknown key (did you mean {near}?), got 1: '
            f"allowed keys are {KEYS}"
        )

    @pytest.mark.parametrize("key", ["zzz", 7])
    def test_unknown_key_like_no_other_gets_the_list(self, key):
        message = error_of({"duo": {key: 1}})
        assert f"{key}: unknown key, got 1: allowed keys are {KEYS}" in message

    def test_sparsity_with_threshold_is_refused(self):
        assert error_of({"duo": {"sparsity": 0.5, "threshold": 0.4}}) == (
            '"duo" in --additional-config: sparsity and threshold: expected at most one of them, '
            "got sparsity=0.5 and threshold=0.4: remove one"
        )

    def test_all_mistakes_are_told_at_once(self):
        message = error_of({"duo": {"sparsity": 2, "threshold": 0.5, "sinc_size": 1, "pattern": 1}})
        starts = [line.split("expected")[0].split("(")[0].strip() for line in message.splitlines()]
        assert starts == [
            '"duo" in --additional-config: pattern:',
            "sparsity:",
            "sinc_size: unknown key",
            "sparsity and threshold:",
        ]

    def test_long_value_is_cut_short(self):
        assert len(error_of({"duo": {"sparsity": "9" * 10_000}})) < 200

    @pytest.mark.parametrize("bad", [None, [], "sparsity=0.5", 0.5])
    def test_duo_that_is_no_object_is_named(self, bad):
        assert error_of({"duo": bad}) == (
            f'"duo" in --additional-config: expected an object, got {bad!r}: '
            'pass for example {"duo": {"sparsity": 0.5}}'
        )

    def test_additional_config_that_is_no_object_is_named(self):
        assert error_of([1]) == (
            '--additional-config: expected an object, got [1]: pass for example {"duo": '
            '{"sparsity": 0.5}}'
        )


def pattern_with(path: Path | None = None, **metadata) -> HeadPattern:
    return HeadPattern(np.array([[0.2, 0.4], [0.6, 0.8]]), metadata, path)


def sizes_of(resolved: ResolvedDuo) -> tuple:
    return (
        (resolved.sink_size, resolved.sink_source),
        (resolved.recent_size, resolved.recent_source),
    )


class TestResolve:
    def test_defaults(self):
        resolved = resolve(DuoConfig(), pattern_with())
        assert sizes_of(resolved) == ((64, "default"), (256, "default"))
        assert (resolved.cut, resolved.cut_value, resolved.cut_source) == (
            "sparsity",
            0.5,
            "default",
        )
        assert resolved.selection == pattern_with().select(sparsity=0.5)

    def test_sparsity_is_applied(self):
        resolved = resolve(read(sparsity=0.25), pattern_with())
        assert (resolved.cut, resolved.cut_value, resolved.cut_source) == (
            "sparsity",
            0.25,
            "setting",
        )
        assert resolved.selection == pattern_with().select(sparsity=0.25)

    def test_sparsity_zero_is_a_setting(self):
        assert resolve(read(sparsity=0), pattern_with()).selection.retrieval.all()

    def test_threshold_is_applied(self):
        resolved = resolve(read(threshold=0), pattern_with())
        assert (resolved.cut, resolved.cut_value, resolved.cut_source) == (
            "threshold",
            0.0,
            "setting",
        )
        assert resolved.selection.retrieval.all()

    def test_balance_cuts_each_ranks_heads(self):
        pattern = HeadPattern(np.array([[0.1, 0.9], [0.2, 0.8]]))
        assert resolve(read(), pattern, 2).selection.retrieval.tolist() == [[False, True]] * 2
        balanced = resolve(read(balance=True), pattern, 2).selection
        assert balanced.retrieval.tolist() == [[False, True], [True, False]]

    def test_without_balance_ranks_do_not_matter(self):
        assert resolve(read(), pattern_with(), 2) == resolve(read(), pattern_with())

    def test_deploy_sizes_of_the_pattern_come_before_the_defaults(self):
        pattern = pattern_with(deploy_sink_size=16, deploy_recent_size=32)
        assert sizes_of(resolve(DuoConfig(), pattern)) == ((16, "pattern"), (32, "pattern"))

    def test_settings_come_before_deploy_sizes(self):
        pattern = pattern_with(deploy_sink_size=16, deploy_recent_size=32)
        resolved = resolve(read(sink_size=0, recent_size=8), pattern)
        assert sizes_of(resolved) == ((0, "setting"), (8, "setting"))

    def test_null_deploy_sizes_are_as_if_not_there(self):
        pattern = pattern_with(deploy_sink_size=None, deploy_recent_size=None)
        assert sizes_of(resolve(DuoConfig(), pattern)) == ((64, "default"), (256, "default"))

    def test_training_settings_of_the_pattern_are_not_used(self):
        pattern = pattern_with(sink_size=1, recent_size=2, threshold=0.9, sparsity=1.0)
        resolved = resolve(DuoConfig(), pattern)
        assert resolved == resolve(DuoConfig(), pattern_with())

    @pytest.mark.parametrize("bad", [-1, 1.5, True, "64", [64], 2**30])
    @pytest.mark.parametrize(("key", "least"), [("sink_size", 0), ("recent_size", 1)])
    def test_bad_deploy_size_names_the_config_file(self, key, least, bad):
        pattern = pattern_with(Path("some/folder"), **{f"deploy_{key}": bad})
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole text is checked
            resolve(DuoConfig(), pattern)
        assert str(caught.value) == (
            f"{Path('some/folder/config.json')}: deploy_{key}: expected {TOKENS} {least} to "
            f"1073741823, got {bad!r}: correct it, or set {key}"
        )

    def test_bad_deploy_size_in_memory_says_so(self):
        with pytest.raises(ValueError, match=r"^head pattern made in memory: deploy_sink_size: "):
            resolve(DuoConfig(), pattern_with(deploy_sink_size=-1))

    def test_bad_deploy_size_does_not_stop_an_explicit_setting(self):
        pattern = pattern_with(deploy_sink_size=-1)
        assert resolve(read(sink_size=4), pattern).sink_size == 4
