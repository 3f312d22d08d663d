"""The few HTTP calls to a server beside the load: health, model, metrics, single greedy answers."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 600.0


class UnreachableError(RuntimeError):
    """A server that should answer does not."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A greedy answer.

    Attributes:
        text: of the answer.
        tokens: its tokens' ids.
        top: at each token, log-probabilities of the likeliest tokens, by id.
    """

    text: str
    tokens: tuple[int, ...]
    top: Sequence[dict[int, float]]


def metrics_text(url: str) -> str:
    """What /metrics says.

    Raises:
        UnreachableError: no answer.
    """
    return _get(f"{url}/metrics").decode()


def max_model_len(url: str) -> int:
    """Longest request that the server takes, in tokens."""
    return int(json.loads(_get(f"{url}/v1/models"))["data"][0]["max_model_len"])


def complete(url: str, prompt: str, max_tokens: int, *, top: int = 0) -> Answer:
    """Ask for a greedy answer that goes on after the end of the sequence.

    Args:
        url: of the server.
        prompt: text.
        max_tokens: length of the answer.
        top: so many likeliest tokens are told at each place.

    Raises:
        UnreachableError: no answer.
        RuntimeError: the server refused the request; with its words.
    """
    body = {
        "model": "benchmark",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    if top:
        body["logprobs"] = top
    choice = json.loads(_post(f"{url}/v1/completions", body))["choices"][0]
    told = (choice.get("logprobs") or {}).get("top_logprobs") or []
    return Answer(
        text=choice["text"],
        tokens=tuple(choice["token_ids"]),
        top=[{int(k.removeprefix("token_id:")): v for k, v in place.items()} for place in told],
    )


def _post(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return _open(request, ANSWER_TIMEOUT_S)


def _get(url: str) -> bytes:
    return _open(urllib.request.Request(url), TIMEOUT_S)


def _open(request: urllib.request.Request, timeout_s: float) -> bytes:
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        told = error.read().decode(errors="replace")[:2000]
        raise RuntimeError(
            f"{request.full_url}: expected an answer, got {error.code}: {told}"
        ) from None
    except (OSError, HTTPException) as error:  # URLError, time-outs and broken connections
        raise UnreachableError(
            f"{request.full_url}: expected an answer within {timeout_s:g} s, got none ({error}): "
            "look into the server's log"
        ) from None
