"""HTTP bodies of all kinds: an answer or a sentence, and the server goes on with every block back."""

from __future__ import annotations

import json

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from tests.e2e.needle import client_of, prompts
from tests.e2e.test_served_requests import assert_all_blocks_return
from tests.fuzz.cases import fuzz, json_values, objects, words
from vllm_duo.evaluate.passkey import is_correct

pytestmark = pytest.mark.engine

TIMEOUT_S = 60
few = st.integers(1, 4)
share = st.floats(0, 1)
# What makes a request long is drawn from small or impossible values only: a case takes no minute.
lengths = st.one_of(few, st.sampled_from([0, -1, 1.5, "3", "x", True, [], {}, 2**63, 10**30]))
counts = st.one_of(st.sampled_from([1, 2]), st.sampled_from([0, -1, 1.5, "x", None, [], {}]))
common = {
    "temperature": share,
    "top_p": share,
    "top_k": st.integers(-1, 50),
    "min_p": share,
    "seed": st.integers(0, 9),
    "stop": st.one_of(words, st.lists(words, max_size=3)),
    "stop_token_ids": st.lists(st.integers(0, 100), max_size=3),
    "stream": st.booleans(),
    "ignore_eos": st.booleans(),
    "min_tokens": st.integers(0, 4),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.1, 2),
    "logit_bias": st.dictionaries(st.integers(0, 99).map(str), st.floats(-9, 9), max_size=2),
    "priority": st.integers(0, 3),
    "cache_salt": words,
    "truncate_prompt_tokens": st.integers(1, 50),
    "skip_special_tokens": st.booleans(),
}
texts = st.one_of(st.just("The pass key is"), words)
completions = objects(
    common
    | {
        "prompt": st.one_of(
            texts,
            st.lists(texts, max_size=2),
            st.lists(st.integers(-1, 300), max_size=40),
            st.lists(st.lists(st.integers(0, 300), max_size=9), max_size=2),
        ),
        "logprobs": st.integers(0, 5),
        "echo": st.booleans(),
        "suffix": words,
        "model": st.just("needle"),
    }
)
message = objects(
    {"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": texts}
)
chats = objects(
    common
    | {
        "messages": st.lists(message, max_size=3),
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(0, 5),
        "add_generation_prompt": st.booleans(),
        "response_format": st.sampled_from(
            [{"type": "text"}, {"type": "json_object"}, {"type": "?"}]
        ),
        "model": st.just("needle"),
    }
)


def post(server, path, body: bytes) -> requests.Response:
    return requests.post(
        f"{server.url}{path}",
        data=body,
        headers={"Content-Type": "application/json"},
        timeout=TIMEOUT_S,
    )


def encoded(body) -> bytes:
    return json.dumps(body).encode("utf-8", "surrogatepass")


def assert_answered(answer: requests.Response) -> None:
    """An answer, or the client's mistake in words; never the server's own failure."""
    assert answer.status_code < 500, answer.text
    if answer.status_code == 200:
        assert answer.content
        return
    error = answer.json()
    assert len(json.dumps(error)) > 20, error


@pytest.fixture
def server(half_server):
    yield half_server
    client = client_of(half_server)
    assert_all_blocks_return(half_server, client)
    (prompt,) = prompts(600, 1)
    answer = client.completions.create(
        model="needle", prompt=prompt.text, max_tokens=12, temperature=0
    )
    assert is_correct(prompt, answer.choices[0].text)


@pytest.mark.parametrize(
    ("path", "bodies", "part"),
    [("/v1/completions", completions, 0.5), ("/v1/chat/completions", chats, 0.4)],
    ids=["completions", "chats"],
)
def test_objects(server, path, bodies, part):
    @fuzz(part)
    @given(body=bodies, length=lengths, count=counts)
    def ask(body, length, count):
        body |= {"model": body.get("model", "needle"), "max_tokens": length, "n": count}
        assert_answered(post(server, path, encoded(body)))

    ask()


def test_bytes_that_are_no_json_object(server):
    @fuzz(0.1)
    @given(
        body=st.one_of(st.binary(max_size=60), json_values.map(encoded)),
        path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
    )
    def ask(body, path):
        answer = post(server, path, body)
        assert_answered(answer)
        assert answer.status_code >= 400

    ask()
