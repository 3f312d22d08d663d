"""Patterns that `vllm-duo identify` finds on the needle model, through the served API."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.e2e.needle import MODEL, RECENT, SINK, accuracy, prompts, serve
from vllm_duo import HeadPattern
from vllm_duo.identify.run import identify
from vllm_duo.identify.settings import IdentifySettings

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1800)]

COUNT, LENGTH = 100, 1024


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Gates with the settings of docs/identification.md; seed 0."""
    settings = IdentifySettings(
        sink_size=SINK, recent_size=RECENT, max_length=512, steps=200, check_samples=0
    )
    return identify(str(MODEL), settings, tmp_path_factory.mktemp("found") / "gates").folder


@pytest.fixture(scope="module")
def upside_down(found, tmp_path_factory):
    """The same heads with the lowest quarter on top."""
    folder = tmp_path_factory.mktemp("upside_down") / "pattern"
    HeadPattern(1.0 - np.clip(HeadPattern.load(found).values, 0.0, 1.0)).save(folder)
    return folder


def served_accuracy(log, folder, sparsity):
    settings = {
        "pattern": str(folder),
        "sparsity": sparsity,
        "sink_size": SINK,
        "recent_size": RECENT,
    }
    arguments = ("--attention-backend", "duo", "--additional-config", json.dumps({"duo": settings}))
    with serve(log, *arguments) as server:
        server.wait_until_ready()
        return accuracy(server, prompts(LENGTH, COUNT, hidden=True))


def test_the_chosen_quarter_of_the_heads_is_enough(found, tmp_path):
    full = served_accuracy(tmp_path / "full", found, 0.0)
    chosen = served_accuracy(tmp_path / "chosen", found, 0.75)
    assert full >= 0.97
    assert full - chosen <= 0.03, (full, chosen)


def test_the_lowest_quarter_of_the_heads_is_not(upside_down, tmp_path):
    lowest = served_accuracy(tmp_path / "lowest", upside_down, 0.75)
    assert lowest <= 0.10, lowest
