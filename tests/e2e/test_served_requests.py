"""Odd requests through HTTP: vLLM's own answers, and every block comes back."""

from __future__ import annotations

import time

import openai
import pytest
import requests

from tests.e2e.needle import client_of, prompts, token_ids
from vllm_duo.kv_cache.layout import KVShape, plan_layout

pytestmark = pytest.mark.engine


@pytest.fixture
def client(half_server):
    return client_of(half_server)


def held_blocks(metrics):
    return {
        key.split("class=")[1].split(",")[0]: value
        for key, value in metrics.items()
        if key.startswith("vllm_duo:held_blocks")
    }


def assert_all_blocks_return(server, client, model="needle"):
    """The engine reports once a step, so a last small request makes it look again."""
    client.completions.create(model=model, prompt="The", max_tokens=2)
    deadline = time.monotonic() + 20
    while any(held_blocks(server.metrics()).values()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert held_blocks(server.metrics()) == {"retrieval": 0, "streaming": 0}


def test_prompt_longer_than_the_model_allows(half_server, client):
    with pytest.raises(openai.BadRequestError, match="4096"):
        client.completions.create(model="needle", prompt="the " * 5000, max_tokens=5)
    assert_all_blocks_return(half_server, client)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("", "must be provided and non-empty"), ([], "at least one prompt")],
)
def test_empty_prompt_gets_vllms_own_answer(prompt, answer, half_server, client):
    with pytest.raises(openai.BadRequestError, match=answer):
        client.completions.create(model="needle", prompt=prompt, max_tokens=3)
    assert_all_blocks_return(half_server, client)


def test_max_tokens_0_gets_vllms_own_answer(half_server, client):
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="needle", prompt="The", max_tokens=0)
    assert_all_blocks_return(half_server, client)


def test_client_gone_while_streaming(half_server, client):
    stream = client.completions.create(
        model="needle",
        prompt="The road",
        max_tokens=2000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()
    assert_all_blocks_return(half_server, client)


def test_client_gone_in_the_middle_of_its_prefill(half_server, client):
    (prompt,) = prompts(3500, 1)
    body = {"model": "needle", "prompt": prompt.text, "max_tokens": 500, "ignore_eos": True}
    # A fast machine has read the prompt and given a short answer in 0.2 s; 500 tokens it has not.
    with pytest.raises(requests.Timeout):
        requests.post(f"{half_server.url}/v1/completions", json=body, timeout=0.1)
    assert_all_blocks_return(half_server, client)


@pytest.mark.feature("metrics on `/metrics`")
def test_metrics_show_what_a_request_holds(half_server, client):
    """The engine's own counts are those of the layout's formulas."""
    layout = plan_layout(
        KVShape(retrieval_heads=RETRIEVAL, streaming_heads=STREAMING, head_size=32, dtype_bytes=4),
        block_size=128,
        sink_size=16,
        recent_size=64,
    )
    # 12 blocks from the first token of the answer to the last, which takes the server long enough to be
    # asked in between.
    prompt = token_ids(prompts(1500, 1)[0].text)[: 11 * 128 + 1]
    assert len(prompt) == 11 * 128 + 1
    seen = {"retrieval": 0.0, "streaming": 0.0}
    wastes = set()
    # The waste is worked out once a second, which on a fast machine is more than one request.
    for _ in range(30):
        stream = client.completions.create(
            model="needle",
            prompt=prompt,
            max_tokens=127,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for _ in stream:
            metrics = half_server.metrics()
            seen = {name: max(seen[name], n) for name, n in held_blocks(metrics).items()}
            wastes.add(round(1e6 * metrics["vllm_duo:pool_waste{engine=0}"]))
        if any(0 < waste < 1e5 for waste in wastes):
            break
    assert wastes - {0} <= {round(1e6 * layout.waste(n)) for n in range(1, 12 * 128 + 1)}
    assert any(0 < waste < 1e5 for waste in wastes)
    assert seen["retrieval"] == 12
    assert seen["streaming"] == len(layout.bins) * layout.span.max_blocks
    metrics = half_server.metrics()
    assert metrics["vllm_duo:block_bytes{engine=0}"] == layout.block_bytes
    (info,) = [key for key in metrics if key.startswith("vllm_duo:info")]
    assert "sparsity=0.5000" in info
    assert "sink_size=16" in info
    assert "pattern=duo_pattern" in info
    assert_all_blocks_return(half_server, client)


@pytest.mark.feature("metrics on `/metrics`")
def test_metrics_count_the_prompts_that_resume(half_server, client):
    """A second time the prompt is hit at its last block boundary: 11 blocks of 128 tokens."""
    name = "vllm_duo:streaming_{}_total{{engine=0}}".format
    prompt = prompts(1450, 2)[1]
    assert 11 * 128 < prompt.tokens <= 12 * 128
    counts = []
    for _ in range(2):
        before = half_server.metrics()
        client.completions.create(model="needle", prompt=prompt.text, max_tokens=3)
        assert_all_blocks_return(half_server, client)
        after = half_server.metrics()
        counts.append(
            {part: after[name(part)] - before[name(part)] for part in ("prefix_hits", "snapshots")}
            | {"tokens": after[name("prefix_hit_tokens")] - before[name("prefix_hit_tokens")]}
        )
    assert counts[0]["snapshots"] > 0
    assert counts[1] == {"prefix_hits": 1, "snapshots": 0, "tokens": 11 * 128}
    assert after["vllm_duo:pool_waste{engine=0}"] == 0, "nothing is held any more"


def _heads():
    from tests.e2e.needle import MODEL
    from vllm_duo import HeadPattern

    mask = HeadPattern.load(MODEL / "duo_pattern").select(sparsity=0.5).retrieval
    return tuple(int(n) for n in mask.sum(1)), tuple(int(n) for n in (~mask).sum(1))


RETRIEVAL, STREAMING = _heads()
