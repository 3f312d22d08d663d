"""``vllm-duo eval``: what a pattern costs in quality, through vLLM itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vllm_duo.evaluate.settings import EvalSettings

app = typer.Typer(add_completion=False, rich_markup_mode=None)

RESULTS_NAME = "results.json"


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, or Hugging Face id of a downloaded model.")],
    out: Annotated[Path, typer.Option(help="Folder for results.json and each engine's answers.")],
    pattern: Annotated[
        str | None, typer.Option(help="Folder or shipped name; default: as the server looks it up.")
    ] = None,
    sparsity: Annotated[
        str, typer.Option(help="Shares that stream, one engine each.")
    ] = "0.25,0.5,0.75",
    tasks: Annotated[str, typer.Option(help="Names of tasks, all or none.")] = "all",
    lengths: Annotated[str, typer.Option(help="Prompts, in tokens.")] = "1024,2048",
    samples: Annotated[int, typer.Option(help="Of each task and length.")] = 20,
    depths: Annotated[str, typer.Option(help="Places of the needle.")] = "0,0.25,0.5,0.75,1",
    perplexity: Annotated[bool, typer.Option(help="Perplexity by position too.")] = True,
    suites: Annotated[str, typer.Option(help="Tasks of lm-eval, asked through vLLM too.")] = "",
    suites_limit: Annotated[int | None, typer.Option(help="Documents of each suite.")] = None,
    suites_path: Annotated[
        Path | None, typer.Option(help="Folder with lm-eval tasks of your own.")
    ] = None,
    suites_fewshot: Annotated[
        int | None, typer.Option(help="Examples before each question; default: the task's.")
    ] = None,
    suites_chat: Annotated[
        bool, typer.Option(help="Suites through the model's chat template.")
    ] = False,
    sink_size: Annotated[int | None, typer.Option(help="Tokens; default as in the server.")] = None,
    recent_size: Annotated[
        int | None, typer.Option(help="Tokens; default as in the server.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all prompts.")] = 0,
    engine_args: Annotated[
        str, typer.Option(help='Arguments of vllm.LLM as JSON: {"dtype": "float32"}.')
    ] = "{}",
    fail_on_loss: Annotated[bool, typer.Option(help="Exit code 1 if a task has lost.")] = False,
) -> None:
    """Ask full attention and duo the same questions and judge each task: within noise, or lost.

    A task that the model cannot do with full attention gets no verdict. A run that was ended goes on
    where it was, if the command and the folder are the same.
    """
    import json

    from vllm_duo.cli.consoles import err
    from vllm_duo.cli.consoles import out as console
    from vllm_duo.evaluate.report import tables
    from vllm_duo.evaluate.run import evaluate as run
    from vllm_duo.evaluate.tasks import TASKS
    from vllm_duo.evaluate.tokenizer import load_tokenizer

    settings = _settings(
        model=model,
        pattern=pattern,
        sparsities=_numbers("--sparsity", sparsity),
        tasks={"all": tuple(TASKS), "none": ()}.get(tasks, _names(tasks)),
        perplexity=perplexity,
        lengths=_numbers("--lengths", lengths),
        depths=_numbers("--depths", depths),
        samples=samples,
        suites=_names(suites),
        suites_limit=suites_limit,
        suites_path=None if suites_path is None else str(suites_path.absolute()),
        suites_fewshot=suites_fewshot,
        suites_chat=suites_chat,
        sink_size=sink_size,
        recent_size=recent_size,
        seed=seed,
        engine=_engine(engine_args),
    )
    count_tokens, vocabulary = load_tokenizer(model)
    out.mkdir(parents=True, exist_ok=True)
    with err.status("Making the questions ...") as status:
        found = run(
            settings,
            out / "engines",
            count_tokens=count_tokens,
            vocabulary=vocabulary,
            progress=lambda name: status.update(f"Asking {name} ..."),
        )
    (out / RESULTS_NAME).write_text(json.dumps(found, indent=1) + "\n")
    for table in tables(found):
        console.print(table)
    console.print(f"Saved to {out / RESULTS_NAME}", markup=False, highlight=False, soft_wrap=True)
    verdicts = [
        side["verdict"]["kind"]
        for task in found["tasks"].values()
        for side in task.get("duo", {}).values()
    ]
    if fail_on_loss and "lost" in verdicts:
        raise typer.Exit(1)


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
