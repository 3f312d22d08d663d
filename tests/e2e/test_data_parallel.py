"""Two replicas behind one address: the same answers as one, with both of them at work."""

from __future__ import annotations

import pytest

from tests.e2e.needle import client_of, greedy_ids, prompts, serve
from tests.e2e.test_served_requests import assert_all_blocks_return

pytestmark = pytest.mark.engine

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(log, "--attention-backend", "duo", "--data-parallel-size", "2") as server:
        server.wait_until_ready()
        yield server


@pytest.mark.feature("data parallelism")
def test_replicas_give_the_tokens_of_one(replicas, half_server):
    asked = prompts(700, 8, hidden=True)
    given = {"max_tokens": NEW_TOKENS, "ignore_eos": True}
    assert greedy_ids(replicas, asked, **given) == greedy_ids(half_server, asked, **given)
    served = replicas.metrics("vllm:request_success_total")
    held = replicas.metrics("vllm_duo:held_blocks")
    for engine in ("engine=0", "engine=1"):
        assert sum(n for key, n in served.items() if engine in key) >= 2, "both are asked"
        assert sum(engine in key for key in held) == 2, "each tells what either class holds"
    assert_all_blocks_return(replicas, client_of(replicas))
