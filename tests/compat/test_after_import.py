"""Patches that wait for a module: when they run, how often, and what stays untouched."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys

import pytest

from vllm_duo.compat import after_import as subject
from vllm_duo.compat.after_import import after_import

_numbers = itertools.count()


@pytest.fixture
def make_module(tmp_path, monkeypatch):
    """Writes a module of a new name; everything is as before afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(subject, "_waiting", dict(subject._waiting))
    monkeypatch.setattr(subject, "_done", set(subject._done))
    made = []

    def make(source: str) -> str:
        name = f"after_import_example_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        made.append(name)
        return name

    yield make
    for name in made:
        sys.modules.pop(name, None)


def test_loaded_module_is_patched_now(make_module):
    name = make_module("value = 1")
    module = importlib.import_module(name)
    seen = []
    after_import(name, seen.append)
    assert seen == [module]


def test_other_module_is_patched_once_it_has_run(make_module):
    name = make_module("value = 1")
    seen = []
    after_import(name, lambda module: seen.append(module.value))
    assert seen == []
    assert name not in sys.modules
    importlib.import_module(name)
    assert seen == [1]


def test_importer_sees_the_patched_module(make_module):
    name = make_module("def answer():\n    return 1")
    user = make_module(f"from {name} import answer\nresult = answer()")
    after_import(name, lambda module: setattr(module, "answer", lambda: 2))
    assert importlib.import_module(user).result == 2


@pytest.mark.parametrize("loaded_first", [True, False])
def test_a_patch_runs_once(make_module, loaded_first):
    name = make_module("")
    seen = []
    if loaded_first:
        importlib.import_module(name)
    for _ in range(3):
        after_import(name, seen.append)
    importlib.import_module(name)
    after_import(name, seen.append)
    assert len(seen) == 1


def test_a_second_patch_of_the_same_module_is_not_taken(make_module):
    name = make_module("")
    seen = []
    after_import(name, lambda _: seen.append("first"))
    after_import(name, lambda _: seen.append("second"))
    importlib.import_module(name)
    assert seen == ["first"]


def test_error_in_the_module_passes_through(make_module):
    name = make_module("raise RuntimeError('the module itself is broken')")
    seen = []
    after_import(name, seen.append)
    with pytest.raises(RuntimeError, match="the module itself is broken"):
        importlib.import_module(name)
    assert seen == []


def test_missing_module_is_reported_as_ever():
    name = f"after_import_missing_{next(_numbers)}"
    after_import(name, lambda _: None)
    try:
        with pytest.raises(ModuleNotFoundError) as caught:
            importlib.import_module(name)
        assert caught.value.name == name
    finally:
        subject._waiting.pop(name, None)


def test_error_in_the_patch_passes_through(make_module):
    name = make_module("")

    def patch(module):
        raise AttributeError("vLLM no longer has it")

    after_import(name, patch)
    with pytest.raises(AttributeError, match="vLLM no longer has it"):
        importlib.import_module(name)


def test_import_that_failed_once_is_patched_when_it_succeeds(make_module, tmp_path):
    name = make_module("import a_package_that_is_not_installed")
    seen = []
    after_import(name, seen.append)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(name)
    (tmp_path / f"{name}.py").write_text("value = 1  # another length, so no stale bytecode")
    importlib.invalidate_caches()
    assert seen == []
    assert importlib.import_module(name) is seen[0]


def test_looking_for_a_module_does_not_lose_its_patch(make_module):
    name = make_module("")
    seen = []
    after_import(name, seen.append)
    assert importlib.util.find_spec(name) is not None
    importlib.import_module(name)
    assert len(seen) == 1


def test_other_modules_are_found_as_ever(make_module):
    waiting, other = make_module(""), make_module("value = 3")
    after_import(waiting, lambda _: pytest.fail("that module was not imported"))
    assert importlib.import_module(other).value == 3


def test_module_that_is_being_imported_is_refused(tmp_path, monkeypatch):
    """It could be patched neither now nor later, and a lost patch means wrong answers."""
    (tmp_path / "half_way_in.py").write_text(
        "from vllm_duo.compat.after_import import after_import\n"
        "after_import(__name__, lambda module: None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="while it is being imported"):
        importlib.import_module("half_way_in")
