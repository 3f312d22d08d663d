"""An evaluation: full attention against duo through vLLM, the same questions to both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_duo.config import SECTION
from vllm_duo.evaluate import perplexity
from vllm_duo.evaluate.engines import answers_of
from vllm_duo.evaluate.prompts import CountTokens, Prompts, load_chat, make_prompts
from vllm_duo.evaluate.questions import Questions, make_questions
from vllm_duo.evaluate.settings import EvalSettings
from vllm_duo.evaluate.statistics import judge, wilson
from vllm_duo.evaluate.suites import check_suites, compared
from vllm_duo.evaluate.tasks import TASKS
from vllm_duo.model_facts import model_refusals
from vllm_duo.planning.checkpoint import read_checkpoint
from vllm_duo.server_plan import make_plan
from vllm_duo.support import refuse
from vllm_duo.versions import installed
from vllm_duo.windows import describe, in_force

FULL = "full"
ROOM_TOKENS = 16
"""Beyond the longest question and answer: a server may count a special token more."""


def engine_arguments(
    settings: EvalSettings, sparsity: float | None, longest: int | None
) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``; stock's own attention where ``sparsity`` is None.

    Full attention keeps its cache in the model's own dtype, whatever ``kv_cache_dtype`` duo's has: what
    quantising costs is part of what is judged. (Where the checkpoint asks for fp8 it has that.)

    Args:
        settings: of the run.
        sparsity: share of the KV heads that stream.
        longest: question and answer, in tokens; None: as long as the model allows.
    """
    limit = {} if longest is None else {"max_model_len": longest + ROOM_TOKENS}
    arguments: dict[str, Any] = {
        "model": settings.model,
        **limit,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": settings.seed,
        **settings.engine,
    }
    if sparsity is None:
        arguments.pop("kv_cache_dtype", None)
    else:
        arguments["attention_backend"] = "duo"
        arguments["additional_config"] = {"duo": settings.duo(sparsity)}
    return arguments


def evaluate(
    settings: EvalSettings,
    folder: Path,
    *,
    count_tokens: CountTokens,
    vocabulary: int,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Ask every engine everything and judge; JSON-ready.

    Args:
        settings: of the run.
        folder: keeps each engine's answers, so that a run that was ended goes on.
        count_tokens: tokens of a text as the model counts them, special ones included.
        vocabulary: tokens that the model knows.
        progress: called with the name of each engine before it starts.

    Raises:
        RuntimeError: an engine failed; suites are asked for, and lm-eval is not installed.
        ValueError: no task fits any length; no such model or pattern, or one of another shape; a chat
            template is asked for, and there is none.
        NotImplementedError: duo cannot serve the model.
    """
    if settings.suites:
        check_suites(settings.suites_path, folder)
    chat = load_chat(settings)
    prompts = make_prompts(settings, count_tokens, chat)
    questions = make_questions(settings, prompts, count_tokens)
    if not questions.rounds and not questions.texts and not settings.suites:
        reasons = "; ".join(
            f"{name}: {reason}"
            for name, why in questions.skipped.items()
            for reason in why.values()
        )
        raise ValueError(f"no task fits any of the lengths: {reasons}")
    selections = {s: selection_of(settings, s) for s in settings.sparsities}
    found: dict[str, dict[str, Any]] = {"questions": {}, "suites": {}}
    template = None if chat is None else chat.template_hash
    suites = settings.suites_job() | {"chat_template": template}
    for kind, name, job in _jobs(settings, questions, prompts, selections, suites):
        progress(name if kind == "questions" else f"{name} by lm-eval")
        file = name if kind == "questions" else f"{name}-{kind}"
        found[kind][name] = answers_of(file, job, folder)
    results = _results(settings, questions, found["questions"], vocabulary)
    results["chat_template"] = template
    if settings.suites:
        scores = {name: answers["suites"] for name, answers in found["suites"].items()}
        duos = {n: (s, scores[n]) for n, s in _engines(settings).items() if s is not None}
        results["tasks"] |= compared(scores[FULL], duos, settings.seed)
    return results | {"selections": {f"duo-{s:g}": found for s, found in selections.items()}}


def _jobs(
    settings: EvalSettings,
    questions: Questions,
    prompts: Prompts,
    selections: Mapping[float, dict[str, Any]],
    suites: Mapping[str, Any],
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """What each engine is asked, as ("questions" or "suites", the engine's name, job).

    Answers are kept by the whole job, and a selection is part of it, as the hashes of the chat template
    and of the suites' own files are: another pattern in the same folder is another job.
    """
    asked: list[list[dict[str, Any]]] = [
        [
            prompts.asked(q.sample.turns, q.sample.start) | {"max_tokens": TASKS[q.task].max_tokens}
            for q in turn
        ]
        for turn in questions.rounds
    ]
    counted = [
        prompts.count(q.sample.turns, q.sample.start) + TASKS[q.task].max_tokens
        for turn in questions.rounds
        for q in turn
    ]
    longest = max([*counted, *settings.lengths])
    _check_windows(settings.model, longest)
    for name, sparsity in _engines(settings).items():
        selection = {"selection": None if sparsity is None else selections[sparsity]}
        if asked or questions.texts:
            own = {"rounds": asked, "texts": questions.texts}
            engine = engine_arguments(settings, sparsity, longest)
            yield "questions", name, {"engine": engine} | selection | own
        if settings.suites:
            engine = engine_arguments(settings, sparsity, None)
            yield "suites", name, {"engine": engine} | selection | {"suites": suites}


def selection_of(settings: EvalSettings, sparsity: float) -> dict[str, Any]:
    """What the server will make of the pattern: refused here before any engine starts.

    Raises:
        ValueError: no such model or pattern, or one of another shape.
        NotImplementedError: duo cannot serve the model.
    """
    checkpoint = read_checkpoint(settings.model)
    facts = checkpoint.facts
    refuse(list(model_refusals(facts)))
    plan = make_plan(
        {SECTION: settings.duo(sparsity)},
        settings.model,
        facts.num_layers,
        facts.num_kv_heads,
        windows=in_force(facts.windows or (), checkpoint.max_model_len or float("inf")),
    )
    return {
        "pattern": plan.pattern_name,
        "mask_hash": plan.resolved.selection.mask_hash,
        "sink_size": plan.resolved.sink_size,
        "recent_size": plan.resolved.recent_size,
    }


def _check_windows(model: str, longest: int) -> None:
    """Refuse questions so short that a window of the model's own, in force for longer ones, is not.

    Raises:
        ValueError: the server of these questions would split the heads of other layers.
    """
    checkpoint = read_checkpoint(model)
    windows = in_force(checkpoint.facts.windows or (), checkpoint.max_model_len or float("inf"))
    if windows != in_force(windows, longest + ROOM_TOKENS):
        raise ValueError(
            f"lengths: {describe(windows)} of the model's own, expected questions that are longer, got "
            f"at most {longest} tokens: the window would hide nothing, and the pattern choose heads "
            "in these layers too; raise --lengths"
        )


def _engines(settings: EvalSettings) -> dict[str, float | None]:
    return {FULL: None} | {f"duo-{sparsity:g}": sparsity for sparsity in settings.sparsities}


def _results(
    settings: EvalSettings,
    questions: Questions,
    sides: dict[str, dict[str, Any]],
    vocabulary: int,
) -> dict[str, Any]:
    scored = {name: _scored(questions, side["rounds"]) for name, side in sides.items()}
    duos = {name: s for name, s in _engines(settings).items() if s is not None}
    tasks: dict[str, Any] = {}
    for name in settings.tasks:
        full = [row for row in scored.get(FULL, ()) if row["task"] == name]
        task: dict[str, Any] = {
            "summary": TASKS[name].summary,
            "skipped_lengths": questions.skipped.get(name, {}),
        }
        if full:
            task["full"] = summary(full)
            task["duo"] = {
                engine: {"sparsity": sparsity}
                | _compared(full, [row for row in scored[engine] if row["task"] == name], settings)
                for engine, sparsity in duos.items()
            }
        tasks[name] = task
    result: dict[str, Any] = {
        "schema_version": 1,
        "kind": "eval",
        "settings": settings.model_dump(mode="json"),
        "versions": installed("vllm-duo", "vllm", "torch", "transformers", otherwise="unknown"),
        "tasks": tasks,
        "samples": scored,
    }
    if questions.texts:
        result["perplexity"] = {
            engine: {"sparsity": sparsity}
            | perplexity.compare(
                sides[FULL]["logprobs"], sides[engine]["logprobs"], vocabulary, settings.seed
            )
            for engine, sparsity in duos.items()
        }
    return result


def _scored(questions: Questions, answers: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """One row a question: its task, place, answer and score."""
    return [
        {
            "task": q.task,
            "length": q.sample.length,
            "depth": q.sample.depth,
            "turn": q.sample.turn,
            "expected": list(q.sample.answers),
            "answer": text,
            "score": TASKS[q.task].score(q.sample, text),
        }
        for asked, texts in zip(questions.rounds, answers, strict=True)
        for q, text in zip(asked, texts, strict=True)
    ]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean score with its interval, by length, and by depth and length where there are depths."""
    by_length: defaultdict[int, list[float]] = defaultdict(list)
    by_cell: defaultdict[tuple[float, int], list[float]] = defaultdict(list)
    by_turn: defaultdict[int, list[float]] = defaultdict(list)
    for row in rows:
        by_length[row["length"]].append(row["score"])
        by_turn[row["turn"]].append(row["score"])
        if row["depth"] is not None:
            by_cell[row["depth"], row["length"]].append(row["score"])
    scores = [row["score"] for row in rows]
    found = {
        "score": _mean(scores),
        "interval": asdict(wilson(sum(scores), len(scores))),
        "samples": len(scores),
        "by_length": {length: _mean(by_length[length]) for length in sorted(by_length)},
    }
    if len(by_turn) > 1:
        found["by_turn"] = {turn: _mean(by_turn[turn]) for turn in sorted(by_turn)}
    if by_cell:
        found["by_depth_and_length"] = [
            {"depth": depth, "length": length, "score": _mean(by_cell[depth, length])}
            for depth, length in sorted(by_cell)
        ]
    return found


def _compared(
    full: Sequence[dict[str, Any]], duo: Sequence[dict[str, Any]], settings: EvalSettings
) -> dict[str, Any]:
    verdict = judge(
        [row["score"] for row in full], [row["score"] for row in duo], seed=settings.seed
    )
    return summary(duo) | {"verdict": asdict(verdict) | {"told": verdict.told()}}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
