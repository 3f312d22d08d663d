"""``vllm-duo eval``: what a pattern costs in quality, through vLLM itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_duo.cli.evaluate_options import HeadOptions, QuestionOptions, RunOptions, SuiteOptions
from vllm_duo.cli.option_groups import grouped

if TYPE_CHECKING:
    from vllm_duo.evaluate.settings import EvalSettings

app = typer.Typer(add_completion=False, rich_markup_mode=None)

RESULTS_NAME = "results.json"


@app.command()
@grouped
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, or Hugging Face id of a downloaded model.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json and each engine's answers.")],
    heads: HeadOptions,
    questions: QuestionOptions,
    suites: SuiteOptions,
    run: RunOptions,
) -> None:
    """Ask full attention and duo the same questions and judge each task: within noise, or lost.

    A task that the model cannot do with full attention gets no verdict. A run that was ended goes on
    where it was, if the command and the folder are the same.
    """
    found = _ask(_read(model, heads, questions, suites, run), out)
    _tell(found, out / RESULTS_NAME)
    if run.fail_on_loss and "lost" in _verdicts(found):
        raise typer.Exit(1)


def _read(
    model: str,
    heads: HeadOptions,
    questions: QuestionOptions,
    suites: SuiteOptions,
    run: RunOptions,
) -> EvalSettings:
    """The settings that the options ask for.

    Raises:
        ValueError: with the options that are wrong.
    """
    from vllm_duo.evaluate.tasks import TASKS

    return _settings(
        model=model,
        pattern=heads.pattern,
        sparsities=_numbers("--sparsity", heads.sparsity),
        sink_size=heads.sink_size,
        recent_size=heads.recent_size,
        streaming_cache_dtype=heads.streaming_cache_dtype,
        tasks={"all": tuple(TASKS), "none": ()}.get(questions.tasks, _names(questions.tasks)),
        lengths=_numbers("--lengths", questions.lengths),
        samples=questions.samples,
        depths=_numbers("--depths", questions.depths),
        perplexity=questions.perplexity,
        apply_chat_template=questions.apply_chat_template,
        seed=questions.seed,
        suites=_names(suites.suites),
        suites_limit=suites.suites_limit,
        suites_path=None if suites.suites_path is None else str(suites.suites_path.absolute()),
        suites_fewshot=suites.suites_fewshot,
        suites_chat=suites.suites_chat,
        engine=_engine(run.engine_args),
    )


def _ask(settings: EvalSettings, out: Path) -> dict[str, Any]:
    """Run the evaluation and tell who is asked; the engines' answers are kept in ``out``."""
    from vllm_duo.cli.consoles import err
    from vllm_duo.evaluate.run import evaluate as run
    from vllm_duo.evaluate.tokenizer import load_tokenizer

    count_tokens, vocabulary = load_tokenizer(settings.model)
    out.mkdir(parents=True, exist_ok=True)
    with err.status("Making the questions ...") as status:
        return run(
            settings,
            out / "engines",
            count_tokens=count_tokens,
            vocabulary=vocabulary,
            progress=lambda name: status.update(f"Asking {name} ..."),
        )


def _tell(found: dict[str, Any], file: Path) -> None:
    """Save the results and print their tables."""
    import json

    from vllm_duo.cli.consoles import out as console
    from vllm_duo.evaluate.report import tables

    file.write_text(json.dumps(found, indent=1) + "\n")
    for table in tables(found):
        console.print(table)
    console.print(f"Saved to {file}", markup=False, highlight=False, soft_wrap=True)


def _verdicts(found: dict[str, Any]) -> set[str]:
    return {
        side["verdict"]["kind"]
        for task in found["tasks"].values()
        for side in task.get("duo", {}).values()
    }


def _settings(**given: Any) -> EvalSettings:
    """The settings, every bad one told at once.

    Raises:
        ValueError: with the flags that are wrong.
    """
    from pydantic import ValidationError

    from vllm_duo.evaluate.settings import EvalSettings

    try:
        return EvalSettings(**given)
    except ValidationError as error:
        told = [
            " ".join([".".join(map(str, item["loc"])), item["msg"].removeprefix("Value error, ")])
            for item in error.errors()
        ]
        raise ValueError("; ".join(part.strip() for part in told)) from None


def _names(given: str) -> tuple[str, ...]:
    return tuple(filter(None, given.split(",")))


def _numbers(flag: str, given: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in given.split(","))
    except ValueError:
        raise ValueError(
            f"{flag}: expected numbers separated by commas, got {given!r}: correct it"
        ) from None


def _engine(given: str) -> dict[str, Any]:
    import json

    try:
        found = json.loads(given)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f'--engine-args: expected a JSON object as in {{"dtype": "float32"}}, got {given!r}'
        )
    return found
