"""The settings of one evaluation; saved beside its results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_duo.config import StreamingCacheDtype
from vllm_duo.evaluate.suite_files import hash_suite

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Length = Annotated[int, Field(ge=16)]


class EvalSettings(BaseModel):
    """What is asked of which model, how often.

    Attributes:
        model: folder or Hugging Face id.
        pattern: folder or name of a shipped pattern; None: looked up as the server does.
        sparsities: shares of the KV heads that stream, one engine each.
        tasks: names of ``TASKS``.
        perplexity: whether to measure perplexity by position too.
        lengths: prompts, in tokens.
        depths: places of the answer for tasks with one, in turn.
        samples: of each task and length.
        apply_chat_template: whether all questions, those of suites too, go through the model's chat
            template; perplexity does not.
        suites: tasks of lm-eval, which answers them through vLLM.
        suites_limit: documents of each; None: all.
        suites_path: folder with tasks of one's own; None: lm-eval's only.
        suites_fewshot: examples before each question; None: as each task has it.
        suites_chat: whether those of suites do, whatever the others do.
        sink_size: of the streaming heads, in tokens; None: as the server would choose.
        recent_size: likewise.
        streaming_cache_dtype: the server's; None: its default.
        seed: of all prompts.
        engine: arguments of ``vllm.LLM`` for both sides, such as ``{"dtype": "float32"}``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    pattern: str | None = None
    sparsities: tuple[Share, ...] = Field(default=(0.25, 0.5, 0.75), min_length=1)
    tasks: tuple[str, ...]
    perplexity: bool = True
    lengths: tuple[Length, ...] = Field(default=(1024, 2048), min_length=1)
    depths: tuple[Share, ...] = Field(default=(0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
    samples: int = Field(default=20, ge=1)
    apply_chat_template: bool = False
    suites: tuple[str, ...] = ()
    suites_limit: int | None = Field(default=None, ge=1)
    suites_path: str | None = None
    suites_fewshot: int | None = Field(default=None, ge=0)
    suites_chat: bool = False
    sink_size: int | None = None
    recent_size: int | None = None
    streaming_cache_dtype: StreamingCacheDtype | None = None
    seed: int = 0
    engine: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _refuse_unknown_tasks(self) -> Self:
        from vllm_duo.evaluate.tasks import TASKS

        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown:
            raise ValueError(
                f"tasks: expected some of {', '.join(TASKS)}, got {', '.join(unknown)}: correct them"
            )
        return self

    @model_validator(mode="after")
    def _refuse_what_is_of_no_suite(self) -> Self:
        given = [
            "--" + name.replace("_", "-")
            for name in ("suites_limit", "suites_path", "suites_fewshot", "suites_chat")
            if getattr(self, name) is not None and getattr(self, name) is not False
        ]
        if given and not self.suites:
            raise ValueError(
                f"suites: expected names of lm-eval's tasks with {', '.join(given)}, got none: name "
                f"some (--suites), or leave {' and '.join(given)} out"
            )
        return self

    def suites_job(self) -> dict[str, Any]:
        """What ``suites.run_suites`` asks lm-eval for.

        ``files`` is there to tell jobs apart: the SHA-256 of all files in ``suites_path`` and of those
        that its tasks name elsewhere.

        Raises:
            ValueError: a task's file cannot be read.
        """
        return {
            "tasks": list(self.suites),
            "limit": self.suites_limit,
            "include_path": self.suites_path,
            "files": None if self.suites_path is None else hash_suite(Path(self.suites_path)),
            "num_fewshot": self.suites_fewshot,
            "apply_chat_template": self.suites_chat or self.apply_chat_template,
            "seed": self.seed,
        }

    def duo(self, sparsity: float) -> dict[str, Any]:
        """The "duo" section of one engine's ``additional_config``."""
        given = {
            "pattern": self.pattern,
            "sparsity": sparsity,
            "sink_size": self.sink_size,
            "recent_size": self.recent_size,
            "streaming_cache_dtype": self.streaming_cache_dtype,
        }
        return {key: value for key, value in given.items() if value is not None}
