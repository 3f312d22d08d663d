"""A served model, its prefix hits as the API returns them, and the same answers from a cold cache."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.prefix_scenarios import Scenario
from vllm_duo.evaluate.server import ServerProcess
from vllm_duo.heads import HeadPattern
from vllm_duo.kv_cache.capacity import Capacity
from vllm_duo.kv_cache.layout import KVShape, Layout, plan_layout

SERVED_NAME = "prefix"
COLD_AT_ONCE = 8
Answer = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt and generated tokens."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server to start.

    Attributes:
        model: checkpoint folder with its pattern.
        kind: with duo's attention backend or with vLLM's own.
        block_size: in tokens.
        sparsity: share of the KV heads that stream.
        chunk_tokens: most tokens of a step.
        max_model_len: longest request, in tokens.
        stock_blocks: the pool, counted in stock's blocks.
    """

    model: Path
    kind: Literal["stock", "duo"]
    block_size: int
    sparsity: float
    chunk_tokens: int
    max_model_len: int
    stock_blocks: int

    @property
    def layout(self) -> Layout:
        """Duo's layout of this model, in float32."""
        config = json.loads((self.model / "config.json").read_text())
        pattern = HeadPattern.load(self.model / "duo_pattern")
        retrieval = pattern.select(sparsity=self.sparsity).retrieval
        return plan_layout(
            KVShape(
                retrieval_heads=tuple(int(n) for n in retrieval.sum(axis=1)),
                streaming_heads=tuple(int(n) for n in (~retrieval).sum(axis=1)),
                head_size=config["head_dim"],
                dtype_bytes=4,
            ),
            block_size=self.block_size,
            sink_size=pattern.metadata["deploy_sink_size"],
            recent_size=pattern.metadata["deploy_recent_size"],
        )

    @property
    def pool_bytes(self) -> int:
        """Bytes of the pool, the same for both kinds to less than a block."""
        return self.stock_blocks * self.layout.full_attention.block_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of this kind."""
        return (self.layout if self.kind == "duo" else self.layout.full_attention).block_bytes

    @property
    def blocks(self) -> int:
        """Blocks of this kind's pool."""
        return self.pool_bytes // self.block_bytes

    def capacity(self) -> dict[str, int]:
        """What the pool holds for running requests, whatever is cached."""
        layout = self.layout if self.kind == "duo" else self.layout.full_attention
        capacity = Capacity(layout=layout, num_blocks=self.blocks)
        return {
            "blocks": self.blocks,
            "block_bytes": self.block_bytes,
            "pool_bytes": self.blocks * self.block_bytes,
            "request_tokens": self.max_model_len,
            "tokens_that_fit": capacity.tokens_that_fit(self.max_model_len),
        }

    def flags(self) -> list[str]:
        """Arguments of ``vllm serve``."""
        flags = [
            *("--served-model-name", SERVED_NAME, "--dtype", "float32", "--enforce-eager"),
            *("--block-size", str(self.block_size), "--enable-prefix-caching"),
            *("--max-model-len", str(self.max_model_len), "--max-num-seqs", "32"),
            *("--hf-overrides", json.dumps({"max_position_embeddings": 16_384})),
            *("--max-num-batched-tokens", str(self.chunk_tokens)),
            *("--num-gpu-blocks-override", str(self.blocks), "--enable-prompt-tokens-details"),
        ]
        if self.kind == "duo":
            section = {"duo": {"sparsity": self.sparsity}}
            flags += ["--attention-backend", "duo", "--additional-config", json.dumps(section)]
        return flags


@contextmanager
def serve(served: Served, log: Path) -> Iterator[ServerProcess]:
    """A server that answers."""
    env = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_LEVEL": "INFO"}
    with ServerProcess(served.model, served.flags(), log=log, env=env) as server:
        server.wait_until_ready()
        yield server


@dataclass
class Result:
    """What a scenario got.

    Attributes:
        name: the scenario.
        prompt_tokens: of all requests.
        hit_tokens: of these, taken from the cache.
        by_request: the same, prompt and hits, request by request.
        peak_held_share: greatest share of the pool that running requests held, as sampled.
        answers: prompts and generated tokens.
    """

    name: str
    prompt_tokens: int = 0
    hit_tokens: int = 0
    by_request: list[tuple[int, int]] = field(default_factory=list)
    peak_held_share: float = 0.0
    answers: list[Answer] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """JSON-ready, without the answers."""
        return {
            "name": self.name,
            "prompt_tokens": self.prompt_tokens,
            "hit_tokens": self.hit_tokens,
            "by_request": self.by_request,
            "peak_held_share": self.peak_held_share,
        }


def run_scenario(server: ServerProcess, scenario: Scenario) -> Result:
    """Send a scenario's waves, continuing each chat with the answer it got."""
    result = Result(scenario.name)
    histories: dict[str, tuple[int, ...]] = {}
    client = client_of(server)
    widest = max(map(len, scenario.waves))
    with watch_usage(server, result), ThreadPoolExecutor(widest) as pool:
        for wave in scenario.waves:
            prompts = [histories.get(sent.chat, ()) + sent.tokens for sent in wave]
            lengths = [sent.answer_tokens for sent in wave]
            answers = pool.map(partial(ask, client), prompts, lengths)
            for sent, prompt, (tokens, hits) in zip(wave, prompts, answers, strict=True):
                histories[sent.chat] = prompt + tokens
                result.answers.append((prompt, tokens))
                result.by_request.append((len(prompt), hits))
                result.prompt_tokens += len(prompt)
                result.hit_tokens += hits
    return result


def client_of(server: ServerProcess) -> Any:
    """An OpenAI client."""
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600)


def ask(
    client: Any, prompt: Sequence[int], answer_tokens: int, salt: str | None = None
) -> tuple[tuple[int, ...], int]:
    """A greedy answer, and the prompt tokens that came from the cache."""
    extra: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
    if salt is not None:
        extra["cache_salt"] = salt
    answer = client.completions.create(
        model=SERVED_NAME,
        prompt=list(prompt),
        max_tokens=answer_tokens,
        temperature=0,
        extra_body=extra,
    )
    details = answer.usage.prompt_tokens_details
    hits = details.cached_tokens if details is not None and details.cached_tokens else 0
    return tuple(answer.choices[0].token_ids), hits


@contextmanager
def watch_usage(server: ServerProcess, result: Result) -> Iterator[None]:
    """Sample the share of the pool that is held, four times a second."""
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.25):
            usage = server.metrics("vllm:kv_cache_usage_perc")
            result.peak_held_share = max([result.peak_held_share, *usage.values()])

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class ColdAnswers:
    """Answers without a cache, asked once a prompt."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def differing(self, server: ServerProcess, answers: Sequence[Answer]) -> list[dict[str, int]]:
        """Where answers are not those of a cold cache: prompt's length, first differing token."""
        client = client_of(server)
        wanted = {prompt: len(tokens) for prompt, tokens in answers if prompt not in self.known}

        def cold(item: tuple[int, tuple[tuple[int, ...], int]]) -> tuple[int, ...]:
            index, (prompt, length) = item
            tokens, hits = ask(client, prompt, length, salt=f"cold {len(self.known)} {index}")
            if hits:
                raise RuntimeError(f"a salted prompt hit {hits} tokens: its answer is not cold")
            return tokens

        with ThreadPoolExecutor(COLD_AT_ONCE) as pool:
            got = list(pool.map(cold, enumerate(wanted.items())))
        self.known.update(zip(wanted, got, strict=True))
        differ = []
        for prompt, tokens in answers:
            pairs = zip(tokens, self.known[prompt], strict=True)
            at = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
            if at is not None:
                differ.append({"prompt_tokens": len(prompt), "first_differing_token": at})
        return differ
