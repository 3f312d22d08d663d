"""KV cache events over ZeroMQ, as a router subscribes to them."""

from __future__ import annotations

import time

import msgspec
import pytest
import zmq
from vllm.distributed.kv_events import KVEventBatch

from tests.cache_events import Consumer
from tests.e2e.engine import engine, write_pattern
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.models.random_models import Shape

pytestmark = pytest.mark.engine

BLOCK_SIZE = 16


@pytest.fixture
def subscriber(tmp_path):
    """A socket that a server may publish to, and all that it has received."""
    endpoint = f"ipc://{tmp_path}/events"
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.setsockopt(zmq.RCVTIMEO, 1000)

        def receive():
            decode = msgspec.msgpack.Decoder(KVEventBatch).decode
            consumer = Consumer()
            while True:
                try:
                    _, _, payload = socket.recv_multipart()
                except zmq.Again:
                    return consumer
                consumer.publish(decode(payload))

        socket.connect(endpoint)
        yield endpoint, receive


@pytest.mark.feature("KV cache events")
def test_a_subscriber_learns_where_a_prompt_can_be_resumed(subscriber, checkpoint, tmp_path):
    endpoint, receive = subscriber
    shape = Shape("llama", group=2, head_size=32, kv_heads=4)
    (prompt,) = prompts_of([333], seed=50)
    with engine(
        checkpoint(shape),
        write_pattern(tmp_path / "pattern", mask_of("mixed", 4)),
        enable_prefix_caching=True,
        kv_events_config={
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": endpoint,
        },
    ) as running:
        time.sleep(1)  # until the subscription has arrived
        running.generate([prompt], 24)
        consumer = receive()
        (output,) = running.llm.generate(
            [{"prompt_token_ids": prompt}], running.sampling(1), use_tqdm=False
        )
    assert consumer.kinds == {0: {"full_attention"}, 1: {"unknown"}}
    pages = [event for event in consumer.events if event.group_idx == 0]
    hashes = [block for event in pages for block in event.block_hashes]
    tokens = [token for event in pages for token in event.token_ids]
    assert tokens[: len(prompt)] == prompt
    whole = hashes[: (len(prompt) - 1) // BLOCK_SIZE]
    resumable = BLOCK_SIZE * consumer.resumable(whole, paged=[0], streaming=[1])
    assert output.num_cached_tokens == resumable == 320
