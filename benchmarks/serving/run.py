"""Runs a benchmark: the gate, then every round of every point on every side."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from benchmarks.serving import gate as gates
from benchmarks.serving import summary
from benchmarks.serving.api import UnreachableError
from benchmarks.serving.client import Load, client_arguments, raise_if_dying, run_client
from benchmarks.serving.folder import RunFolder
from benchmarks.serving.launch import CommandLauncher, ForkLauncher, Launcher
from benchmarks.serving.prompts import Texts
from benchmarks.serving.servers import Fleet, Running, is_resident
from benchmarks.serving.settings import GATE_SIDE, Point, Settings
from benchmarks.serving.workloads import Request, make_requests, read_requests, write_requests
from vllm_duo.report.serve_results import Gate, Run, ServeResults

WARM_TOKENS = (512, 4096)
"""Prompts that a fresh server gets first, unless all points have shorter ones."""


class GateError(RuntimeError):
    """Wrong answers: nothing is measured."""


@dataclass(frozen=True)
class Task:
    """One run to do."""

    point: Point
    side: str
    round: int


Done = Callable[[Run], None]
Start = Callable[[Task], None]


def order(settings: Settings, *, resident: bool) -> list[Task]:
    """All runs.

    The side that goes first changes from round to round, so that a slow drift of the machine falls on
    all sides alike. Resident servers alternate at every point; servers that run in turn are started
    once a round.
    """
    tasks = []
    for round_ in range(settings.rounds):
        first = round_ % len(settings.sides)
        sides = settings.sides[first:] + settings.sides[:first]
        if resident:
            tasks += [Task(p, side, round_) for p in settings.points for side in sides]
        else:
            tasks += [Task(p, side, round_) for side in sides for p in settings.points]
    return tasks


class Benchmark:
    """One benchmark in its run folder.

    Args:
        settings: what to measure.
        folder: begun with these settings.
        tell: gets a line at each step that takes long.
        vllm: command in place of ``vllm``.
    """

    def __init__(
        self,
        settings: Settings,
        folder: RunFolder,
        tell: Callable[[str], None],
        vllm: Sequence[str] | None = None,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.tell = tell
        self.vllm = vllm
        self.texts = Texts(settings.model)
        self.warm: set[int] = set()
        done = {(run.point, run.side, run.round) for run in folder.finished(settings)}
        self.tasks = [
            task
            for task in order(settings, resident=is_resident(settings))
            if (task.point.key, task.side, task.round) not in done
        ]

    def run(self, start: Start, done: Done) -> ServeResults:
        """Do what is not done yet; all that is finished stays in the folder whatever happens.

        Args:
            start: called before each run.
            done: called after it.

        Raises:
            ValueError: a point does not fit the model, or the documents and the dataset the points.
            GateError: the gate is red.
            RuntimeError: a server or the client failed.
        """
        datasets = {
            (task.point.key, task.round): self._requests(task.point, task.round)
            for task in self.tasks
        }
        with (
            Fleet(self.settings, self.folder.logs, self.tell, self.vllm) as fleet,
            ForkLauncher() as forks,
        ):
            launcher = forks if self.vllm is None else CommandLauncher(self.vllm)
            gate = self.folder.gate() or self._gate(fleet)
            if fleet.resident:
                fleet.start(sorted({task.side for task in self.tasks}))
            try:
                for task in self.tasks:
                    start(task)
                    done(self._measure(fleet, launcher, task, datasets[task.point.key, task.round]))
                    self._save(gate)
            finally:
                results = self._save(gate)
        return results

    def _requests(self, point: Point, round_: int) -> list[Request]:
        """Made once: a run that goes on sends what it had, even where the user's files have changed."""
        file = self.folder.requests(point, round_)
        if not file.exists():
            write_requests(make_requests(self.settings, point, round_, self.texts), file)
        return read_requests(file)

    def _use(self, fleet: Fleet, side: str) -> Running:
        """The side's server, warm: a fresh one compiles and allocates at its first requests."""
        server = fleet.use(side)
        if id(server) not in self.warm:
            self.folder.save_side(server.described)
            self._refuse_too_long(server)
            rng = random.Random(f"{self.settings.seed} warm")
            longest = max(p.prompt_tokens for p in self.settings.points) or gates.PROMPT_TOKENS
            for tokens in sorted({min(longest, most) for most in WARM_TOKENS}):
                prompt = self.texts.random(tokens - self.texts.special_tokens, rng)
                gates.ask_server(server.url, prompt, 8, 0)
            self.warm.add(id(server))
        return server

    def _refuse_too_long(self, server: Running) -> None:
        allowed = server.described.max_model_len
        for point in self.settings.points:
            wanted = point.prompt_tokens + point.output_tokens
            if wanted > allowed:
                raise ValueError(
                    f"{point.key}: expected at most {allowed} tokens (--max-model-len of the server), "
                    f"got {point.prompt_tokens} + {point.output_tokens}: lower --lengths or "
                    '--output-tokens, or raise --server-args="--max-model-len N"'
                )

    def _gate(self, fleet: Fleet) -> Gate:
        self.tell("correctness gate")
        questions = gates.make_questions(self.settings, self.texts)
        if fleet.resident:
            fleet.start(list(dict.fromkeys((*self.settings.sides, GATE_SIDE))))

        def ask(side: str, prompt: str, max_tokens: int, top: int) -> Any:
            server = self._use(fleet, side)
            try:
                return gates.ask_server(server.url, prompt, max_tokens, top)
            except UnreachableError:
                raise_if_dying(server.check_alive)
                raise

        gate = gates.check(self.settings, questions, ask)
        if GATE_SIDE not in self.settings.sides:
            fleet.stop(GATE_SIDE)
        self.folder.save_gate(gate)
        if not gate.passed:
            self._save(gate)
            raise GateError(gates.told(gate))
        return gate

    def _measure(
        self, fleet: Fleet, launcher: Launcher, task: Task, requests: Sequence[Request]
    ) -> Run:
        server = self._use(fleet, task.side)
        file = self.folder.run(task.point.key, task.side, task.round)
        dataset = self.folder.requests(task.point, task.round)
        load = Load(
            url=server.url,
            model=self.settings.model,
            point=task.point,
            requests=dataset,
            count=len(requests),
            seed=self.settings.seed + task.round,
            result=file.with_suffix(".client.json"),
            log=file.with_suffix(".client.log"),
            timeout_s=self.settings.point_timeout_s,
        )
        started, idle = datetime.now(UTC), fleet.idle_cpu_s(task.side)
        raw, counted = run_client(load, launcher, server.check_alive)
        idle = fleet.idle_cpu_s(task.side) - idle
        samples = summary.samples_ms(raw)
        asked = [request for request in requests if request.answer]
        run = Run(
            side=task.side,
            point=task.point.key,
            round=task.round,
            started=started.isoformat(timespec="seconds"),
            duration_s=raw["duration"],
            requests=raw["completed"],
            input_tokens=raw["total_input_tokens"],
            output_tokens=raw["total_output_tokens"],
            output_tokens_per_s=raw["output_throughput"],
            total_tokens_per_s=raw["total_token_throughput"],
            **{kind: summary.quantiles(values) for kind, values in samples.items()},
            server=counted,
            passkeys_asked=len(asked),
            passkeys_right=summary.right_passkeys(requests, raw["generated_texts"]),
            idle_servers_cpu_s=max(0.0, idle),
            client_command=["vllm", "bench", "serve", *client_arguments(load)],
            client_file=self.folder.relative(load.result),
            requests_file=self.folder.relative(dataset),
        )
        self.folder.save_run(run)
        return run

    def _save(self, gate: Gate) -> ServeResults:
        """Write results.json with all that is in."""
        runs = self.folder.finished(self.settings)
        total = len(order(self.settings, resident=True))
        points = summary.point_results(self.settings, runs, self.folder.path, gate.judges_passkeys)
        results = ServeResults(
            complete=len(runs) == total,
            settings=self.settings.model_dump(mode="json"),
            versions=self.folder.versions(),
            gate=gate,
            sides=self.folder.sides(self.settings),
            points=points,
        )
        self.folder.save_results(results)
        return results
