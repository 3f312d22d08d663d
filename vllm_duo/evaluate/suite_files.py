"""The files that tasks of one's own are made of: answers are kept as long as none of them changes.

These are all files in the folder of ``--suites-path``, and what its YAML files name elsewhere on this
machine: ``include``, and ``dataset_path``, ``data_dir`` and ``data_files``. Files that a task's Python
code opens by itself are known only if they lie in the folder; documents on a hub are not looked at.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import Any

YAML = (".yaml", ".yml")
PASSED_OVER = ("__pycache__", ".git")
"""Folders that change without a change of the tasks: Python writes the first as lm-eval runs."""


def hash_suite(folder: Path) -> str:
    """SHA-256 of names and contents, its first 12 digits.

    Args:
        folder: with tasks of lm-eval.

    Raises:
        ValueError: a YAML file cannot be read as one.
        OSError: a file cannot be read.
    """
    files = set(_regular(folder))
    todo = sorted(file for file in files if file.suffix in YAML)
    while todo:
        for named in _named(todo.pop()):
            for file in _regular(named):
                if file not in files:
                    files.add(file)
                    if named.suffix in YAML:
                        todo.append(file)
    found = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        found.update(f"{os.path.relpath(file, folder)}\0{digest}\0".encode())
    return found.hexdigest()[:12]


def _regular(path: Path) -> Iterator[Path]:
    """The path's absolute name if it is a regular file; of a folder, those of all files below it.

    Links are followed, each folder is entered once.
    """
    if path.is_file():
        yield Path(os.path.abspath(path))
    entered = set()
    for root, folders, names in os.walk(path, followlinks=True):
        here = os.path.realpath(root)
        folders[:] = [] if here in entered else [f for f in folders if f not in PASSED_OVER]
        if here not in entered:
            entered.add(here)
            yield from (
                Path(os.path.abspath(root)) / name
                for name in names
                if os.path.isfile(f"{root}/{name}")
            )


def _named(file: Path) -> Iterator[Path]:
    """What a YAML file names on this machine; relative names as lm-eval and datasets take them.

    ``include`` is relative to the file; documents to ``data_dir`` or a local ``dataset_path`` if one is
    given, else to the working directory. Both are looked for in all of these places: a file too many
    costs a question that is asked again, one too few keeps answers to other documents.
    """
    task = _read(file)
    included = task.get("include") or []
    for name in _texts(included):
        yield file.parent / name
    given = task.get("dataset_kwargs")
    given = given if isinstance(given, dict) else {}
    bases = [Path()]
    for name in (*_texts(task.get("dataset_path")), *_texts(given.get("data_dir"))):
        if "://" not in name:
            bases.append(Path(name).expanduser())
            yield bases[-1]
    for name in _texts(given.get("data_files")):
        if "://" not in name:
            for base in bases:
                pattern = str(base / Path(name).expanduser())
                yield from map(Path, {pattern, *glob(pattern, recursive=True)})


def _read(file: Path) -> dict[str, Any]:
    """A task's or a group's settings; tags such as ``!function`` stand for nothing here."""
    import yaml

    # A class of its own: what is added to PyYAML's would hold for all of this process.
    Loader: Any = type("Loader", (yaml.SafeLoader,), {})
    Loader.add_multi_constructor("!", lambda *_: None)
    try:
        found = yaml.load(file.read_bytes(), Loader)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{file}: expected YAML, as lm-eval reads its tasks, got: {error}; correct the file, or "
            "move it out of the folder of --suites-path"
        ) from None
    return found if isinstance(found, dict) else {}


def _texts(value: Any) -> Iterator[str]:
    """All texts in lists and mappings of texts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
