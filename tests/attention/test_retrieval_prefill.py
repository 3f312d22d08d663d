"""Which kernel serves the retrieval heads of prefills on a GPU; the choice alone, with stand-ins."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.ops.flashinfer_stand_in import StandIn
from vllm_duo.attention import retrieval_prefill
from vllm_duo.attention.retrieval_prefill import (
    choose,
    find_flashinfer,
    layer_kernel,
    server_choice,
)
from vllm_duo.ops.batch import HeadMap
from vllm_duo.ops.prefill.flashinfer import FlashInferPrefill


def function(**arguments):
    raise AssertionError("nothing is run here")


def make_choice(
    setting, dtype=torch.bfloat16, head_size=128, block_size=16, has_sinks=False, error=None
):
    def find(size):
        assert setting != "flashinfer"
        assert size == head_size
        if error:
            raise ImportError(error)
        return function, 3

    def find_flashinfer():
        assert setting == "flashinfer", "only where it is asked for"
        if error:
            raise ImportError(error)
        return StandIn, "0.7.0.post1"

    return choose(
        setting,
        dtype=dtype,
        head_size=head_size,
        block_size=block_size,
        has_sinks=has_sinks,
        find_flash_attn=find,
        find_flashinfer=find_flashinfer,
    )


@pytest.mark.parametrize("setting", ["auto", "flash-attn"])
def test_flash_attention_where_it_runs(setting):
    choice = make_choice(setting)
    assert choice.name == "flash-attn 3"
    assert choice.kernel.keywords == {"flash_attn_varlen_func": function, "fa_version": 3}


def test_triton_when_set():
    choice = make_choice("triton", error="must not be looked for")
    assert (choice.name, choice.kernel) == ("triton", None)
    assert choice.reason == "set by retrieval_prefill"


PROBLEMS = [
    ({"dtype": torch.float32}, "it takes float16 and bfloat16, not torch.float32"),
    ({"head_size": 100}, "it takes head sizes up to 256 in steps of 8, not 100"),
    ({"head_size": 512}, "it takes head sizes up to 256 in steps of 8, not 512"),
    ({"block_size": 24}, "it takes blocks of a multiple of 16 tokens, not 24"),
    ({"error": "no FlashAttention here"}, "no FlashAttention here"),
]


@pytest.mark.parametrize(("arguments", "problem"), PROBLEMS)
def test_auto_says_why_it_is_triton(arguments, problem):
    choice = make_choice("auto", **arguments)
    assert (choice.name, choice.kernel) == ("triton", None)
    assert choice.reason == f"FlashAttention cannot serve this: {problem}"


@pytest.mark.parametrize(("arguments", "problem"), PROBLEMS)
def test_flash_attention_is_never_replaced_when_set(arguments, problem):
    with pytest.raises(NotImplementedError, match=problem):
        make_choice("flash-attn", **arguments)


def test_every_problem_is_told_at_once():
    with pytest.raises(NotImplementedError, match=r"not torch.float32; .* not 24"):
        make_choice("flash-attn", dtype=torch.float32, block_size=24)


def test_flashinfer_when_set():
    choice = make_choice("flashinfer")
    assert (choice.name, choice.reason) == ("flashinfer 0.7.0.post1", "set by retrieval_prefill")
    assert isinstance(choice.kernel, FlashInferPrefill)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"dtype": torch.float32}, "it takes float16 and bfloat16, not torch.float32"),
        ({"head_size": 96}, "it takes the head sizes 64, 128 and 256, not 96"),
        ({"block_size": 128}, r"it takes blocks of 16, 32 and 64 tokens \(--block-size\), not 128"),
        ({"error": "not installed"}, "not installed"),
    ],
)
def test_flashinfer_is_never_replaced_when_set(arguments, problem):
    why = (
        f'^retrieval_prefill "flashinfer": FlashInfer cannot serve this: {problem}: set "triton" or'
    )
    with pytest.raises(NotImplementedError, match=why):
        make_choice("flashinfer", **arguments)


class TestFindFlashInfer:
    @pytest.fixture
    def here(self, monkeypatch):
        """Installs a stand-in for FlashInfer."""

        def here(version="0.7.0.post1", *, kernels=True, module=None):
            monkeypatch.setattr(retrieval_prefill, "version", lambda _: version)
            monkeypatch.setattr("vllm.utils.flashinfer.has_flashinfer", lambda: kernels)
            module = module or SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=StandIn)
            monkeypatch.setitem(sys.modules, "flashinfer", module)

        return here

    # What vLLM 0.32 and 0.33 ask for.
    @pytest.mark.parametrize("version", ["0.7.0.post1", "0.7.2.post1"])
    def test_found(self, here, version):
        here(version)
        assert find_flashinfer() == (StandIn, version)

    @pytest.mark.parametrize("version", ["0.6.13", "0.8.0"])
    def test_other_versions(self, here, version):
        here(version)
        with pytest.raises(ImportError, match=f"{version} is installed, expected >=0.7.0,<0.8: "):
            find_flashinfer()

    def test_not_installed(self, monkeypatch):
        def version(name):
            raise PackageNotFoundError(name)

        monkeypatch.setattr(retrieval_prefill, "version", version)
        with pytest.raises(ImportError, match=r"flashinfer-python is not installed \(pip install"):
            find_flashinfer()

    def test_no_kernels(self, here):
        here(kernels=False)
        with pytest.raises(ImportError, match=r"finds no kernels here .* nvcc"):
            find_flashinfer()

    def test_parts_of_different_versions(self, here):
        class Broken:
            def __getattr__(self, name):
                raise RuntimeError("flashinfer-cubin version does not match")

        here(module=Broken())
        with pytest.raises(ImportError, match="does not import: flashinfer-cubin version"):
            find_flashinfer()


def test_learned_sinks_are_triton_s_alone():
    choice = make_choice("auto", has_sinks=True)
    assert (choice.name, choice.kernel) == ("triton", None)
    assert choice.reason == (
        "FlashAttention cannot serve this: it would leave the model's learned sinks out"
    )
    assert make_choice("triton", has_sinks=True).reason == "set by retrieval_prefill"


@pytest.mark.parametrize("setting", ["flash-attn", "flashinfer"])
def test_a_kernel_that_leaves_learned_sinks_out_is_refused(setting):
    with pytest.raises(NotImplementedError, match="would leave the model's learned sinks out: set"):
        make_choice(setting, has_sinks=True)


@pytest.fixture
def fresh_choice():
    server_choice.cache_clear()
    yield
    server_choice.cache_clear()


@pytest.mark.usefixtures("fresh_choice")
def test_flashinfer_is_prepared_for_each_layer_s_heads(monkeypatch):
    """Before the server takes requests: the compiler would keep the first prompt waiting."""
    made = []

    def make(*arguments):
        made.append(StandIn(*arguments))
        return made[-1]

    monkeypatch.setattr(retrieval_prefill, "find_flashinfer", lambda: (make, "0.7.0.post1"))
    kernels = {
        layer_kernel(
            "flashinfer",
            HeadMap.from_mask(np.array(mask), torch.device("cpu")),
            dtype=torch.bfloat16,
            head_size=128,
            block_size=16,
            group=4,
            scale=0.5,
        )
        for mask in ([True, False, True], [False, True, True], [True, False, False], [False] * 3)
    }
    assert len(kernels) == 1
    assert [wrapper.shape for wrapper in made] == [(8, 2, 128, 16), (4, 1, 128, 16)]
    assert all(wrapper.scale == 0.5 for wrapper in made)


@pytest.mark.usefixtures("fresh_choice")
def test_layer_with_learned_sinks_does_not_share_the_choice_of_one_without(monkeypatch):
    monkeypatch.setattr(retrieval_prefill, "find_flash_attn", lambda _: (function, 3))
    heads = HeadMap.from_mask(np.array([True]), torch.device("cpu"))
    sizes = {"head_size": 64, "block_size": 16, "group": 1, "scale": 1.0}
    kernels = [
        layer_kernel("auto", heads, dtype=torch.bfloat16, has_sinks=has_sinks, **sizes)
        for has_sinks in (False, True)
    ]
    assert [kernel is None for kernel in kernels] == [False, True]


@pytest.mark.usefixtures("fresh_choice")
def test_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(retrieval_prefill, "find_flash_attn", lambda _: (function, 2))
    monkeypatch.setattr(retrieval_prefill.logger, "propagate", True)
    with caplog.at_level(logging.INFO, logger=retrieval_prefill.logger.name):
        for _ in range(3):
            server_choice("auto", torch.float16, 64, 16)
    (line,) = caplog.messages
    assert line.endswith("prefills: flash-attn 2 (the default where it runs)")
