"""The command line itself: its list of commands, how errors come out, how little it imports."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import typer

from vllm_duo.cli import main as cli

HEAVY = {"torch", "vllm", "transformers", "numpy", "pydantic", "matplotlib"}


@pytest.fixture
def failing(monkeypatch):
    """Adds the command ``fail``, which raises the given error."""

    def failing(error: BaseException) -> None:
        module = types.ModuleType("failing_command")
        module.app = typer.Typer()

        @module.app.command()
        def fail() -> None:
            raise error

        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command(module.__name__, "Fail."))

    return failing


def test_every_command_is_listed_with_its_line(run):
    code, out, _ = run("--help")
    assert code == 0
    for name, command in cli.COMMANDS.items():
        assert f"  {name}" in out
        assert command.help.split()[0] in out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert f"Usage: vllm-duo {name}" in out


def test_help_imports_no_command():
    code = (
        "import sys\nfrom vllm_duo.cli.main import COMMANDS, app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "modules = {command.module for command in COMMANDS.values()}\n"
        f"print('imported:', sorted((modules | {HEAVY}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"


@pytest.mark.parametrize("kind", [ValueError, NotImplementedError, RuntimeError, OSError])
def test_error_of_the_input_is_one_sentence(run, failing, kind):
    failing(kind("expected [this], got that: change it"))
    code, out, stderr = run("fail")
    assert (code, out) == (2, "")
    assert stderr == "Error: expected [this], got that: change it\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "out of memory: an allocation failed"),
        (MemoryError("out of memory with [all]: use less"), "out of memory with [all]: use less"),
    ],
)
def test_memory_that_ran_out_is_told_once(run, failing, error, told):
    failing(error)
    assert run("fail") == (2, "", f"Error: {told}\n")


def test_debug_variable_shows_the_traceback(monkeypatch, failing):
    failing(ValueError("told"))
    monkeypatch.setenv(cli.DEBUG_VARIABLE, "1")
    monkeypatch.setattr(sys, "argv", ["vllm-duo", "fail"])
    with pytest.raises(ValueError, match="told"):
        cli.main()


def test_error_of_the_program_keeps_its_traceback(monkeypatch, failing):
    failing(KeyError("a defect"))
    monkeypatch.setattr(sys, "argv", ["vllm-duo", "fail"])
    with pytest.raises(KeyError):
        cli.main()


def test_exit_code_of_a_check_is_kept(run, failing):
    failing(typer.Exit(1))
    assert run("fail")[0] == 1


def test_unknown_command(run):
    code, _, stderr = run("patern")
    assert code == 2
    assert "No such command 'patern'" in stderr


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("vllm-duo 0.")
