"""Standard suites (LongBench, RULER, GSM8K, ...) through lm-eval and its vLLM backend.

Each side runs in a process of its own, as the tasks of this package do, and the scores of the same
documents are paired and judged alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_duo.evaluate.statistics import judge, wilson

NOT_INSTALLED = "--suites need lm-eval, which is not installed: pip install 'vllm-duo[suites]'"
Scores = Mapping[str, Mapping[str, float]]
"""Of one side: name of a task's score to the documents' scores, 0 to 1."""


def compared(full: Scores, duos: Mapping[str, tuple[float, Scores]], seed: int) -> dict[str, Any]:
    """The suites' part of a result's ``tasks``.

    Args:
        full: of full attention.
        duos: engine to its sparsity and scores.
        seed: of the verdicts' resampling.

    Raises:
        RuntimeError: the sides were not scored on the same documents.
    """
    tasks: dict[str, Any] = {}
    for name, expected in full.items():
        for engine, (_, scores) in duos.items():
            if scores.get(name, {}).keys() != expected.keys():
                raise RuntimeError(
                    f"{name}: expected scores of the same {len(expected)} documents from both sides, "
                    f"got {len(scores.get(name, {}))} from {engine}: remove the folder of the engines' "
                    "answers and run again"
                )
        documents = list(expected)
        theirs = [expected[document] for document in documents]
        sides = {}
        for engine, (sparsity, scores) in duos.items():
            ours = [scores[name][document] for document in documents]
            verdict = judge(theirs, ours, seed=seed)
            told = {"verdict": asdict(verdict) | {"told": verdict.told()}}
            sides[engine] = {"sparsity": sparsity} | _summary(ours) | told
        tasks[name] = {
            "summary": "a task of lm-eval",
            "skipped_lengths": {},
            "full": _summary(theirs),
            "duo": sides,
        }
    return tasks


def _summary(scores: Sequence[float]) -> dict[str, Any]:
    total = sum(scores)
    return {
        "score": total / len(scores),
        "interval": asdict(wilson(total, len(scores))),
        "samples": len(scores),
    }


def check_suites(path: str | None, out: Path) -> None:
    """Refuse suites that no engine could be asked, before the first one starts.

    Args:
        path: folder with tasks of one's own; None: there is none.
        out: folder that keeps the answers.

    Raises:
        RuntimeError: lm-eval is not installed.
        ValueError: no such folder, or the answers would be among its files.
    """
    if find_spec("lm_eval") is None:
        raise RuntimeError(NOT_INSTALLED)
    if path is not None and not Path(path).is_dir():
        found = "a file" if Path(path).exists() else "nothing there"
        raise ValueError(
            f"--suites-path {path}: expected a folder with tasks of lm-eval (*.yaml), found {found}: "
            "correct the path, or leave it out"
        )
    if path is not None and out.resolve().is_relative_to(Path(path).resolve()):
        raise ValueError(
            f"--out {out}: expected a folder outside --suites-path {path}, whose files are the tasks, "
            "got one in it: answers there would read as other tasks; choose another"
        )


def run_suites(job: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Ask one engine what a job names, in this process.

    Args:
        job: ``engine``: arguments of ``vllm.LLM``; ``suites``: ``tasks``, ``limit``, ``include_path``,
            ``num_fewshot``, ``apply_chat_template`` and ``seed``.

    Returns:
        ``Scores``.

    Raises:
        RuntimeError: lm-eval is not installed.
        ValueError: no such task, or none of its scores lies between 0 and 1.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise RuntimeError(NOT_INSTALLED) from None
    given = job["suites"]
    manager = TaskManager(include_path=given["include_path"])
    if unknown := sorted(set(given["tasks"]) - set(manager.all_tasks)):
        raise ValueError(
            f"--suites: expected names of lm-eval's tasks, got {', '.join(unknown)}: see `lm-eval ls "
            "tasks`, or name your tasks' folder with --suites-path"
        )
    arguments = dict(job["engine"])
    found = simple_evaluate(
        model="vllm",
        model_args={"pretrained": arguments.pop("model"), **arguments},
        tasks=list(given["tasks"]),
        num_fewshot=given["num_fewshot"],
        limit=given["limit"],
        apply_chat_template=given["apply_chat_template"],
        task_manager=manager,
        bootstrap_iters=0,
        random_seed=given["seed"],
        numpy_random_seed=given["seed"],
        torch_random_seed=given["seed"],
        fewshot_random_seed=given["seed"],
    )
    if found is None:
        raise RuntimeError("lm-eval gave no results")
    scores = scores_of(found["samples"], found["higher_is_better"])
    if not scores:
        raise ValueError(
            f"--suites {','.join(given['tasks'])}: expected scores of documents from 0 (wrong) to 1 "
            "(right), found none: choose other tasks"
        )
    return scores


def scores_of(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    higher_is_better: Mapping[str, Mapping[str, bool | None]],
) -> dict[str, dict[str, float]]:
    """The scores of documents among lm-eval's samples; those that are no share of 1 are left out.

    A task's name, with its filter where it has several, and its metric make a score's name:
    "gsm8k, strict-match: exact_match".
    """
    found: dict[str, dict[str, float]] = {}
    for task, rows in samples.items():
        filters = {row["filter"] for row in rows}
        for row in rows:
            prefix = task if len(filters) == 1 else f"{task}, {row['filter']}"
            for metric in row["metrics"]:
                if higher_is_better.get(task, {}).get(metric):
                    scores = found.setdefault(f"{prefix}: {metric}", {})
                    scores[str(row["doc_id"])] = row[metric]
    return {name: scores for name, scores in found.items() if all(map(_is_share, scores.values()))}


def _is_share(value: Any) -> bool:
    return isinstance(value, bool | int | float) and 0 <= value <= 1
