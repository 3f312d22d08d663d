"""A real server keeps as many requests as the plan says, with a published pattern's layers and heads.

The model has the layers and KV heads of Llama-3.1-8B and next to no hidden size; requests are short and
the kept tokens few, so that a pool of a few gibibytes holds as many requests, in about the same
proportion to stock, as a GPU's holds of 32k tokens.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from random import Random

import pytest
import requests
from transformers import LlamaConfig

from tests.e2e.needle import SERVER_ENV
from vllm_duo.evaluate.server import ServerProcess
from vllm_duo.planning.plan import PlanRequest, plan_memory

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PATTERN = "Meta-Llama-3.1-8B-Instruct"
LAYERS, KV_HEADS, HEAD_SIZE = 32, 8, 32
BLOCK = 32
# One token more than whole blocks: the answer's first 31 tokens need no further block, so that nobody
# grows while the last requests come in, a dozen steps later.
PROMPT = 12 * BLOCK + 1
ANSWER = 31
MAX_MODEL_LEN = 1024
SINK, RECENT = 2, 3  # of 385 tokens: 1.3 %, where 64 and 256 of 32k are 1 %
POOL_GIB = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Config alone: the weights are dummies."""
    folder = tmp_path_factory.mktemp("model") / "llama"
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=KV_HEADS * HEAD_SIZE,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_SIZE,
        vocab_size=512,
        max_position_embeddings=MAX_MODEL_LEN,
        dtype="float32",
    ).save_pretrained(folder)
    return folder


def serve(model, log, *arguments):
    flags = [
        "--load-format",
        "dummy",
        "--skip-tokenizer-init",
        "--enforce-eager",
        "--dtype",
        "float32",
    ]
    flags += f"--max-model-len {MAX_MODEL_LEN} --max-num-batched-tokens 8192".split()
    flags += f"--block-size {BLOCK} --max-num-seqs 512".split()
    env = SERVER_ENV | {"VLLM_CPU_KVCACHE_SPACE": str(POOL_GIB)}
    return ServerProcess(model, [*flags, *arguments], log=log, env=env)


def most_running(server, asked):
    """Requests that run at once before the first one ends, and those that wait then.

    Nothing may have been preempted by then.
    """
    random = Random(0)
    body = {
        "model": server.command[2],
        "prompt": [[random.randrange(2, 512) for _ in range(PROMPT)] for _ in range(asked)],
        "max_tokens": ANSWER,
        "ignore_eos": True,
    }
    url = f"{server.url}/v1/completions"
    client = threading.Thread(target=lambda: requests.post(url, json=body, timeout=600))
    client.start()
    seen = (0, 0)
    while client.is_alive():
        counts = server.metrics("vllm:")
        value = Counter()
        for key, number in counts.items():
            value[key.split("{")[0]] += number
        if value["vllm:request_success_total"]:
            break
        assert value["vllm:num_preemptions_total"] == 0
        running = int(value["vllm:num_requests_running"])
        seen = max(seen, (running, int(value["vllm:num_requests_waiting"])))
        time.sleep(0.1)
    server.stop()
    client.join()
    return seen


@pytest.mark.timeout(900)
def test_a_server_keeps_as_many_requests_as_planned(model, tmp_path):
    settings = {"pattern": PATTERN, "sparsity": 0.5, "sink_size": SINK, "recent_size": RECENT}
    plan = plan_memory(
        PlanRequest(
            model=str(model),
            duo=settings,
            kv_cache_bytes=int(POOL_GIB * (1 << 30)),
            max_model_len=MAX_MODEL_LEN,
            dtype="float32",
            block_size=BLOCK,
            lengths=(PROMPT,),
        )
    )
    planned = int(plan.by_length[0].concurrent_requests)
    planned_stock = int(plan.full.by_length[0].concurrent_requests)
    assert planned_stock >= 100

    with serve(model, tmp_path / "stock.log") as server:
        server.wait_until_ready()
        stock, waiting = most_running(server, planned_stock + 20)
    assert (stock, waiting) == (planned_stock, 20)

    arguments = ["--attention-backend", "duo", "--additional-config", json.dumps({"duo": settings})]
    with serve(model, tmp_path / "duo.log", *arguments) as server:
        server.wait_until_ready()
        duo, waiting = most_running(server, planned + 20)
    assert (duo, waiting) == (planned, 20)
    assert duo / stock >= 1.84  # 14 blocks a request where stock's 13 have the bytes of 26
