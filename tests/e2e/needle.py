"""Pass-key questions to a served needle model."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import OpenAI
from tokenizers import Tokenizer

from vllm_duo.evaluate.passkey import is_correct, key_visible, make_prompt
from vllm_duo.evaluate.server import ServerProcess

MODEL = Path(__file__).resolve().parents[2] / "models" / "needle"
SINK, RECENT = 16, 64
SEED = 20_240_817  # neither the training nor the README's figures used it
# What a server needs beside the environment that in-process engines set for themselves.
SERVER_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    # Of memory that is free; without it vLLM wants nearly all there is.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # vLLM's own binding would put two servers of two test processes on the same core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "INFO",
    "NUMBA_DISABLE_JIT": "0",
    # The default closes a connection that was silent for 5 s: on a busy machine just as it is used.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
}
FLAGS = ["--dtype", "float32", "--max-model-len", "4096", "--served-model-name", "needle"]

_tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def serve(log, *arguments, eager=True, **kwargs):
    """A server of the needle model on this machine; by default eager, for a quick start."""
    flags = [*FLAGS, *(["--enforce-eager"] if eager else []), *arguments]
    return ServerProcess(MODEL, flags, log=log, env=SERVER_ENV, **kwargs)


def client_of(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def token_ids(text):
    return _tokenizer.encode(text).ids


def count_tokens(text):
    return len(token_ids(text))


def prompts(length, count, seed=SEED, *, hidden=False):
    """``count`` prompts of about ``length`` tokens; ``hidden``: the key is outside the window."""
    rng = random.Random(seed * 10_007 + length)
    made = []
    while len(made) < count:
        prompt = make_prompt(length, rng=rng, count_tokens=count_tokens)
        if hidden and key_visible(prompt, sink_size=SINK, recent_size=RECENT):
            continue
        made.append(prompt)
    return made


def accuracy(server, asked, *, chat=False):
    """Share of right answers, over the OpenAI API with eight requests in flight."""
    client = client_of(server)

    def ask(prompt):
        if chat:
            answer = client.chat.completions.create(
                model="needle",
                messages=[{"role": "user", "content": prompt.text}],
                max_tokens=12,
                temperature=0,
            )
            return is_correct(prompt, answer.choices[0].message.content)
        answer = client.completions.create(
            model="needle", prompt=prompt.text, max_tokens=12, temperature=0
        )
        return is_correct(prompt, answer.choices[0].text)

    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(ask, asked)) / len(asked)


def greedy_ids(server, asked, *, max_tokens, **extra):
    """Token ids of the greedy answers, with eight requests in flight."""
    client = client_of(server)

    def ask(prompt):
        answer = client.completions.create(
            model="needle",
            prompt=prompt.text,
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"return_token_ids": True, **extra},
        )
        return answer.choices[0].token_ids

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, asked))
