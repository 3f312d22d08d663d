"""An in-process vLLM engine for tests: start, generate, look into the pool, clean up."""

from __future__ import annotations

import gc
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

MAX_NEW_TOKENS = 64
SETTINGS: dict[str, object] = {}
"""Of every engine with duo; ``runner_v2.py`` adds one."""


@dataclass(frozen=True)
class Answer:
    """One request's greedy tokens and, per token, its reported log-probabilities."""

    tokens: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]


def write_pattern(folder: Path, retrieval) -> Path:
    """A pattern folder whose threshold 0.5 gives exactly this mask."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.asarray(retrieval, dtype=float)
    np.savetxt(folder / "full_attention_heads.tsv", values, delimiter="\t")
    (folder / "config.json").write_text(json.dumps({}))
    return folder


def ranks_of(count: int) -> dict[str, object]:
    """Settings of an engine over this many tensor-parallel ranks, of which each needs a core."""
    if count == 1:
        return {}
    if len(os.sched_getaffinity(0)) < count:
        pytest.skip(f"tensor parallelism {count} needs as many cores, this process may use fewer")
    return {"tensor_parallel_size": count, "distributed_executor_backend": "mp"}


class Engine:
    """vLLM's offline engine with duo, or stock where ``retrieval`` is None."""

    def __init__(
        self, model, pattern=None, *, sink_size=20, recent_size=75, duo_settings=None, **settings
    ):
        from vllm import LLM

        duo = {}
        if pattern is not None:
            duo = {
                "attention_backend": "duo",
                "additional_config": {
                    "duo": {
                        "pattern": str(pattern),
                        "threshold": 0.5,
                        "sink_size": sink_size,
                        "recent_size": recent_size,
                        **SETTINGS,
                        **(duo_settings or {}),
                    }
                },
            }
        self.llm = LLM(
            model=str(model),
            **duo,
            **{
                "dtype": "float32",
                "enforce_eager": True,
                "skip_tokenizer_init": True,
                "block_size": 16,
                "max_model_len": 2200,
                "max_num_batched_tokens": 2048,
                "max_num_seqs": 32,
                "disable_log_stats": True,
                "num_gpu_blocks_override": 6000,
                **settings,
            },
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.manager = self.core.scheduler.kv_cache_manager

    def generate(self, prompts, max_tokens=MAX_NEW_TOKENS):
        """Greedy answers of all prompts, sent together."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            self.sampling(max_tokens),
            use_tqdm=False,
        )
        return [answer_of(output) for output in outputs]

    @staticmethod
    def sampling(max_tokens=MAX_NEW_TOKENS):
        from vllm import SamplingParams

        return SamplingParams(
            max_tokens=max_tokens, temperature=0, logprobs=3, ignore_eos=True, detokenize=False
        )

    def is_compiled(self):
        """Whether torch.compile is at work: ``enforce_eager`` is not all that switches it off."""
        from vllm.config import CompilationMode

        return self.llm.llm_engine.vllm_config.compilation_config.mode != CompilationMode.NONE

    def block_bytes(self):
        """Bytes of a pool block, by every cache that lies in it."""
        config = self.core.scheduler.kv_cache_config
        return {tensor.size // config.num_blocks for tensor in config.kv_cache_tensors}

    def record_preemptions(self):
        """The requests that are preempted from now on, in a list that grows."""
        scheduler, preempted = self.core.scheduler, []
        preempt = scheduler._preempt_request

        def record(request, *args, **kwargs):
            preempted.append(request.request_id)
            return preempt(request, *args, **kwargs)

        scheduler._preempt_request = record
        return preempted

    def check_pool(self, *, idle):
        """free + held == total, no block in two tables, every ring within its formula."""
        from vllm_duo.kv_cache.manager import RingManager

        pool = self.manager.block_pool
        held = []
        for manager in self.manager.coordinator.single_type_managers:
            for blocks in manager.req_to_blocks.values():
                held += [block.block_id for block in blocks]
            if isinstance(manager, RingManager):
                manager.allocator.check_integrity()
        assert pool.null_block.block_id not in held
        assert len(held) == len(set(held))
        assert pool.get_num_free_blocks() + len(held) == pool.num_gpu_blocks - 1
        if idle:
            assert held == []


def answer_of(output):
    """An answer from vLLM's request output."""
    completion = output.outputs[0]
    rows = tuple({t: p.logprob for t, p in row.items()} for row in completion.logprobs)
    return Answer(tuple(completion.token_ids), rows)


@contextmanager
def engine(model, pattern=None, **settings):
    """Start an engine; afterwards its pool must be whole again and the process clean."""
    from vllm.distributed import cleanup_dist_env_and_memory

    running = Engine(model, pattern, **settings)
    try:
        yield running
        running.check_pool(idle=True)
    finally:
        running.llm.llm_engine.engine_core.shutdown()
        del running.llm, running.core, running.manager
        gc.collect()
        cleanup_dist_env_and_memory()
