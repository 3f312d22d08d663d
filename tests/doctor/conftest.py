"""The command line, in this process."""

from tests.cli_run import run

__all__ = ["run"]
