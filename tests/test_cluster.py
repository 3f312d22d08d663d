"""What a node of a cluster answers, and what is made of it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from unittest import mock

import cloudpickle
import numpy as np
import pytest

from vllm_duo import HeadPattern
from vllm_duo.cluster import Question, facts, make_probe, payload, problem_of

LAYERS, HEADS = 4, 2


@pytest.fixture(autouse=True)
def environment():
    """A node's probe changes its process's variables."""
    with mock.patch.dict(os.environ):
        yield os.environ


@pytest.fixture
def question(tmp_path):
    """Makes the question of a server whose pattern is a folder."""
    HeadPattern(np.arange(LAYERS * HEADS, dtype=float).reshape(LAYERS, HEADS) / 8).save(
        tmp_path / "pattern"
    )

    def question(environment=None, *, overwrites=False, **duo) -> Question:
        return Question(
            additional_config={"duo": {"pattern": str(tmp_path / "pattern")} | duo},
            model="any",
            num_layers=LAYERS,
            num_kv_heads=HEADS,
            tensor_parallel_size=2,
            pipeline_parallel_size=2,
            environment=environment or {},
            overwrites=overwrites,
        )

    return question


@pytest.fixture
def answer(question):
    """This process's own answer."""
    return make_probe()(payload(question()))


def expected_of(question):
    return facts(**payload(question)["plan"])


def test_a_node_like_this_one_has_no_problem(question, answer):
    assert problem_of(answer, expected_of(question())) is None
    assert answer["facts"]["vllm-duo"] == version("vllm-duo")
    assert answer["facts"]["layers of each stage"] == "2, 2"


@pytest.mark.parametrize(
    ("duo", "told"),
    [
        ({"sparsity": 0.25}, "expected mask "),
        ({"recent_size": 128}, "expected recent_size 128, got 256"),
        ({"sink_size": 8}, "expected sink_size 8, got 64"),
    ],
)
def test_another_plan(question, answer, duo, told):
    problem = problem_of(answer, expected_of(question(**duo)))
    assert told in problem
    assert problem.endswith("give every node the same pattern folder and environment")


def test_another_partition(question, answer, environment):
    environment["VLLM_PP_LAYER_PARTITION"] = "1,3"
    problem = problem_of(answer, expected_of(question()))
    assert "expected layers of each stage 1, 3, got 2, 2" in problem


def test_a_partition_is_sent_along(question, environment):
    given = {"VLLM_PP_LAYER_PARTITION": "1,3"}
    answer = make_probe()(payload(question(given)))
    assert environment["VLLM_PP_LAYER_PARTITION"] == "1,3"
    assert answer["facts"]["layers of each stage"] == "1, 3"


def test_another_version(question, answer):
    problem = problem_of(answer, expected_of(question()) | {"vllm-duo": "99.0"})
    own = version("vllm-duo")
    assert problem == f"expected vllm-duo 99.0, got {own}: install vllm-duo==99.0 there"


def test_a_pattern_that_is_not_there(question, answer, tmp_path):
    expected = expected_of(question())
    (tmp_path / "pattern" / "full_attention_heads.tsv").unlink()
    problem = problem_of(make_probe()(payload(question())), expected)
    assert problem.startswith("it has no plan for this server (ValueError: ")
    assert str(tmp_path / "pattern") in problem


def test_not_installed(question, answer):
    problem = problem_of(answer | {"is_registered": False}, expected_of(question()))
    assert problem.startswith("vllm-duo is on the path but not installed")


@pytest.mark.parametrize(
    ("sent", "own", "overwrites", "counts"),
    [
        (None, None, False, None),
        ("duo", None, False, "duo"),
        (None, "other", False, "other"),
        ("duo", "other", False, "other"),
        ("duo", "other", True, "duo"),
        (None, "other", True, "other"),
    ],
)
def test_which_plugins_count(question, environment, sent, own, overwrites, counts):
    """RayExecutorV2 keeps a node's own variable, RayDistributedExecutor puts the server's there."""
    environment.pop("VLLM_PLUGINS", None)
    if own is not None:
        environment["VLLM_PLUGINS"] = own
    given = {} if sent is None else {"VLLM_PLUGINS": sent}
    answer = make_probe()(payload(question(given, overwrites=overwrites)))
    assert answer["plugins"] == counts
    problem = problem_of(answer, expected_of(question()))
    assert (problem is None) == (counts in (None, "duo"))
    if problem:
        assert problem.startswith("VLLM_PLUGINS='other' leaves vllm-duo out: add duo to it")


def test_the_probe_needs_nothing_of_this_package(question, tmp_path):
    """It is read and asked in a process that cannot import the package."""
    sent = tmp_path / "sent"
    sent.write_bytes(cloudpickle.dumps((make_probe(), payload(question()))))
    code = (
        "import pathlib, sys, cloudpickle\n"
        "sys.modules['vllm_duo'] = None\n"
        f"probe, question = cloudpickle.loads(pathlib.Path({str(sent)!r}).read_bytes())\n"
        "print(probe(question)['import_error'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "vllm_duo" in done.stdout
    problem = problem_of({"import_error": done.stdout.strip()}, expected_of(question()))
    assert problem.startswith("vllm-duo cannot be imported (")
