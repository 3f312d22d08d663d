"""What the terminal shows: progress with the time left, and the figures at the end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.serving.run import Task
from benchmarks.serving.settings import Settings
from vllm_duo.report.serve_results import Run, ServeResults, SideAtPoint, Spread


class Screen:
    """A progress bar over the runs; use it as a context manager.

    Args:
        console: where it goes.
        settings: of the benchmark.
    """

    def __init__(self, console: Console, settings: Settings) -> None:
        self.console = console
        self.settings = settings
        self.left: list[Task] = []
        self.took: dict[str, list[float]] = {}
        self.started = 0.0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )
        self.bar = self.progress.add_task("starting", total=None, left="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def expect(self, tasks: Sequence[Task], finished: Iterable[Run]) -> None:
        """What is to be done, and what runs that are finished tell of its duration."""
        self.left = list(tasks)
        runs = list(finished)
        for run in runs:
            self.took.setdefault(run.point, []).append(run.duration_s)
        self.progress.update(self.bar, total=len(tasks) + len(runs), completed=len(runs))

    def tell(self, words: str) -> None:
        """A step beside the runs."""
        self.console.print(words, markup=False, soft_wrap=True)
        self.progress.update(self.bar, description=words)

    def start(self, task: Task) -> None:
        """A run begins."""
        self.started = time.monotonic()
        words = f"{task.side}: {task.point.key}, round {task.round + 1}"
        self.progress.update(self.bar, description=words, left=self._time_left())

    def done(self, run: Run) -> None:
        """A run is finished."""
        self.took.setdefault(run.point, []).append(time.monotonic() - self.started)
        self.left = self.left[1:]
        self.progress.update(self.bar, advance=1, left=self._time_left())
        self.console.print(
            f"{run.side}: {run.point}, round {run.round + 1}: {run.output_tokens_per_s:.1f} output "
            f"tokens/s, median TTFT {run.ttft_ms.median:.0f} ms, TPOT {run.tpot_ms.median:.1f} ms",
            markup=False,
            soft_wrap=True,
        )

    def _time_left(self) -> str:
        seconds = time_left_s(self.left, self.took)
        if seconds is None:
            return "time left: not known yet"
        return (
            f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
        )


def time_left_s(left: Sequence[Task], took: dict[str, list[float]]) -> float | None:
    """Seconds that runs will take: as other runs of their points, or else by their tokens.

    Args:
        left: runs to do.
        took: seconds of finished runs, by point.

    Returns:
        None where nothing is finished.
    """
    if not took:
        return None
    means = {key: sum(values) / len(values) for key, values in took.items()}
    overall = sum(means.values()) / len(means)
    return sum(means.get(task.point.key, overall) for task in left)


def tables(results: ServeResults) -> Iterator[Table]:
    """One for each point, with a line for each side.

    Of throughputs the median and the [lowest, highest] round, of latencies the median and the (95th
    percentile) of all requests.
    """
    for point in results.points:
        load = f"{point.rate:g} requests/s" if point.rate else f"{point.concurrency} in flight"
        title = f"{point.workload}, {point.prompt_tokens:,} + {point.output_tokens} tokens, {load}"
        made = Table(
            "", "out tok/s", "x stock", "TTFT", "TPOT", "E2E", "KV", "hits", "keys", title=title
        )
        for side in point.sides:
            made.add_row(side.side, *_cells(side))
        yield made


def _cells(side: SideAtPoint) -> list[str]:
    """Throughput with its lowest and highest round, latencies with their 95th percentile."""
    hits, asked, times = side.prefix_hit_rate, side.passkeys_asked, side.times_stock_output
    return [
        _spread(side.output_tokens_per_s, ".0f"),
        _spread(times, ".2f") if times else "",
        *(
            f"{kind.median:.0f} ms\n({kind.p95:.0f})"
            for kind in (side.ttft_ms, side.tpot_ms, side.e2e_ms)
        ),
        f"{side.peak_kv_share:.0%}",
        "" if hits is None else f"{hits:.0%}",
        f"{side.passkeys_right}/{asked}" if asked else "",
    ]


def _spread(value: Spread, form: str) -> str:
    return f"{value.median:{form}}\n[{value.low:{form}}, {value.high:{form}}]"
