"""``vllm bench serve`` for many runs: vLLM is imported once, and each run is a fork of that process.

A client's imports take longer than a short run, and some machines have two cores. What a run does is
the command's own code with the command's own flags.

    python benchmarks/serving/bench_client.py

reads a line of JSON a run, ``{"arguments": [...], "log": FILE}``, and answers with a line as it begins,
``{"pid": N}``, and one as it ends, ``{"exit": CODE}``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

Client = Callable[[Sequence[str]], None]


def load_client() -> Client:
    """Import vLLM's client; returns what runs it with flags of ``vllm bench serve``."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.serve import main as run
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def client(arguments: Sequence[str]) -> None:
        parser = FlexibleArgumentParser(prog="vllm bench serve")
        add_cli_args(parser)
        run(parser.parse_args(list(arguments)))

    return client


def run_jobs(client: Client) -> None:
    """Fork for each line of standard input until it ends."""
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(client, job)
        with contextlib.suppress(OSError):  # the child may have come first
            os.setpgid(pid, pid)
        _answer({"pid": pid})
        _, status = os.waitpid(pid, 0)
        _answer({"exit": os.waitstatus_to_exitcode(status)})


def _run(client: Client, job: dict[str, Any]) -> None:
    """Be a command of one's own, in a process group of one's own; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        client(job["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _answer(message: dict[str, int]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    run_jobs(load_client())
