"""The options of ``vllm-duo eval``, in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Which heads stream, and what they keep."""

    pattern: Annotated[
        str | None, Option(help="Folder or shipped name; default: as the server looks it up.")
    ] = None
    sparsity: Annotated[str, Option(help="Shares that stream, one engine each.")] = "0.25,0.5,0.75"
    sink_size: Annotated[int | None, Option(help="Tokens; default as in the server.")] = None
    recent_size: Annotated[int | None, Option(help="Tokens; default as in the server.")] = None
    streaming_cache_dtype: Annotated[
        str | None, Option(help="With a quantised cache: same or model, as in the server.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """What is asked."""

    tasks: Annotated[str, Option(help="Names of tasks, all or none.")] = "all"
    lengths: Annotated[str, Option(help="Prompts, in tokens.")] = "1024,2048"
    samples: Annotated[int, Option(help="Of each task and length.")] = 20
    depths: Annotated[str, Option(help="Places of the needle.")] = "0,0.25,0.5,0.75,1"
    perplexity: Annotated[bool, Option(help="Perplexity by position too.")] = True
    apply_chat_template: Annotated[
        bool,
        Option(
            "--apply-chat-template",
            help="All questions through the model's chat template, as instruct models need it.",
        ),
    ] = False
    seed: Annotated[int, Option(help="Of all prompts.")] = 0


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """Tasks of lm-eval."""

    suites: Annotated[str, Option(help="Tasks of lm-eval, asked through vLLM too.")] = ""
    suites_limit: Annotated[int | None, Option(help="Documents of each suite.")] = None
    suites_path: Annotated[Path | None, Option(help="Folder with lm-eval tasks of your own.")] = (
        None
    )
    suites_fewshot: Annotated[
        int | None, Option(help="Examples before each question; default: the task's.")
    ] = None
    suites_chat: Annotated[bool, Option(help="Suites alone through the model's chat template.")] = (
        False
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How the engines run, and what a loss means."""

    engine_args: Annotated[
        str, Option(help='Arguments of vllm.LLM as JSON: {"dtype": "float32"}.')
    ] = "{}"
    fail_on_loss: Annotated[bool, Option(help="Exit code 1 if a task has lost.")] = False
