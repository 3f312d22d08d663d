"""Which kernel serves the retrieval heads of prefills on a GPU; the choice alone, with stand-ins."""

from __future__ import annotations

import logging

import pytest
import torch

from vllm_duo.attention import retrieval_prefill
from vllm_duo.attention.retrieval_prefill import choose, server_choice


def function(**arguments):
    raise AssertionError("nothing is run here")


def make_choice(setting, dtype=torch.bfloat16, head_size=128, block_size=16, error=None):
    def find(size):
        assert size == head_size
        if error:
            raise ImportError(error)
        return function, 3

    return choose(
        setting, dtype=dtype, head_size=head_size, block_size=block_size, find_flash_attn=find
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


def test_flashinfer_is_not_connected():
    with pytest.raises(NotImplementedError, match='"flashinfer" is not connected yet'):
        make_choice("flashinfer")


def test_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(retrieval_prefill, "find_flash_attn", lambda _: (function, 2))
    monkeypatch.setattr(retrieval_prefill.logger, "propagate", True)
    server_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger=retrieval_prefill.logger.name):
        for _ in range(3):
            server_choice("auto", torch.float16, 64, 16)
    server_choice.cache_clear()
    (line,) = caplog.messages
    assert line.endswith("prefills: flash-attn 2 (the default where it runs)")
