"""One vLLM engine in a process of its own, which answers a file of questions and ends.

    python -m vllm_duo.evaluate.worker JOB.json ANSWERS.json

A job is ``{"engine": {...}, "rounds": [[{"prompt", "max_tokens"}, ...], ...], "texts": [...]}``: the
arguments of ``vllm.LLM``, the questions by turn, and texts whose tokens' log-probabilities are wanted.
A question has ``prompt_token_ids`` instead of ``prompt`` where a chat template made it.
Answers are ``{"rounds": [[text, ...], ...], "logprobs": [[...], ...]}``, greedy. A job with ``suites``
instead of questions is one for ``suites.run_suites``; its answer is ``{"suites": {...}}``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_duo.evaluate.suites import run_suites

if TYPE_CHECKING:
    from vllm import LLM


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Start the engine and answer everything.

    Raises:
        KeyError: the job is not whole; before vLLM is imported.
    """
    if "suites" in job:
        return {"suites": run_suites(job)}
    arguments, rounds, texts = job["engine"], job["rounds"], job["texts"]
    from vllm import LLM

    engine = LLM(**arguments)
    return {
        "rounds": [_answers(engine, questions) for questions in rounds],
        "logprobs": [_logprobs(engine, text) for text in texts],
    }


def _answers(engine: LLM, questions: list[dict[str, Any]]) -> list[str]:
    from vllm import SamplingParams

    outputs = engine.generate(
        [_prompt(question) for question in questions],
        [SamplingParams(temperature=0, max_tokens=q["max_tokens"]) for q in questions],
        use_tqdm=False,
    )
    return [output.outputs[0].text for output in outputs]


def _prompt(question: dict[str, Any]) -> Any:
    """Text, to which vLLM adds special tokens, or tokens as they stand."""
    if "prompt_token_ids" in question:
        return {"prompt_token_ids": question["prompt_token_ids"]}
    return question["prompt"]


def _logprobs(engine: LLM, text: str) -> list[float]:
    """Log-probability of each token of the text but the first."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (output,) = engine.generate([text], wanted, use_tqdm=False)
    rows = output.prompt_logprobs or []
    tokens = output.prompt_token_ids or []
    return [
        float(row[token].logprob)
        for row, token in zip(rows[1:], tokens[1:], strict=True)
        if row is not None
    ]


if __name__ == "__main__":
    found = answer(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
