"""The needle model through the served API: it can tell a right cache from a wrong one."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from tests.e2e.needle import MODEL, accuracy, prompts, serve

pytestmark = pytest.mark.engine

LENGTHS = (256, 512, 1024, 2048)


def duo(**settings):
    return ["--attention-backend", "duo", "--additional-config", json.dumps({"duo": settings})]


@pytest.fixture(scope="module")
def top_quarter_streams(tmp_path_factory):
    """The shipped pattern upside down: at 25 % the most needed heads stream."""
    folder = tmp_path_factory.mktemp("upside_down") / "pattern"
    shutil.copytree(MODEL / "duo_pattern", folder)
    tsv = folder / "full_attention_heads.tsv"
    np.savetxt(tsv, 1 - np.clip(np.loadtxt(tsv), 0, 1), delimiter="\t")
    return folder


def measure(log, arguments, count, *, lengths=LENGTHS, hidden=False):
    with serve(log, *arguments) as server:
        server.wait_until_ready()
        return {n: accuracy(server, prompts(n, count, hidden=hidden)) for n in lengths}


@pytest.fixture(scope="module")
def half_streams_accuracy(half_server):
    return {n: accuracy(half_server, prompts(n, 40)) for n in LENGTHS}


@pytest.fixture(scope="module")
def full_accuracy(tmp_path_factory):
    return measure(tmp_path_factory.mktemp("full") / "log", duo(sparsity=0.0), 40)


def test_full_attention_finds_the_key(full_accuracy):
    assert min(full_accuracy.values()) >= 0.97, full_accuracy


@pytest.mark.feature("completions API")
def test_half_of_the_heads_streaming_loses_at_most_two_points(half_streams_accuracy, full_accuracy):
    lost = np.mean(list(full_accuracy.values())) - np.mean(list(half_streams_accuracy.values()))
    assert lost <= 0.02, (half_streams_accuracy, full_accuracy)


@pytest.mark.feature("chat completions API")
def test_chat_endpoint_answers_as_well(half_server):
    assert accuracy(half_server, prompts(512, 20), chat=True) >= 0.95


def test_all_heads_streaming_loses_the_key(tmp_path):
    found = measure(tmp_path / "log", duo(sparsity=1.0), 20, lengths=(512, 1024), hidden=True)
    assert max(found.values()) <= 0.10, found


@pytest.mark.slow
def test_top_quarter_streaming_loses_the_key(tmp_path, top_quarter_streams):
    settings = duo(pattern=str(top_quarter_streams), sparsity=0.25)
    found = measure(tmp_path / "log", settings, 20, lengths=(512, 1024), hidden=True)
    assert max(found.values()) <= 0.10, found


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_200_prompts_of_each_length(sparsity, tmp_path):
    found = measure(tmp_path / "log", duo(sparsity=sparsity), 200)
    assert min(found.values()) >= (0.97 if sparsity == 0 else 0.95), found
