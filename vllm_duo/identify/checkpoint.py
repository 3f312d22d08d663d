"""Progress of a run on disk: one file, replaced as a whole, tied to the run that wrote it."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import resource
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CHECKPOINT_NAME = "checkpoint.npz"
_RUN_KEY = "__run__"

Arrays = dict[str, npt.NDArray[Any]]


def run_fingerprint(facts: Mapping[str, Any]) -> str:
    """16 hex digits over what makes two runs the same: model, method and settings."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def explain_full_disk(folder: Path, size_bytes: int, kept: str) -> Iterator[None]:
    """Say what to do when the disk is full, or a file may grow no further.

    Args:
        folder: that is written to.
        size_bytes: of all that is written.
        kept: what is left of the run, in words.

    Raises:
        OSError: as it came, with a message that names the folder, the bytes and what is kept.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            largest = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
            problem = f"a file of this process may have {largest} bytes (ulimit -f)"
            remedy = "raise the limit"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            problem, remedy = f"the disk of {folder} is full, or the quota on it", "make room"
        else:
            raise
        raise OSError(
            error.errno,
            f"{problem}: {size_bytes} bytes are needed in {folder}{_free(folder)}; {kept}: {remedy} "
            "and run the same command with --resume",
        ) from None


def _free(folder: Path) -> str:
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return f", {shutil.disk_usage(there).free} are free"


def write_atomically(file: Path, content: bytes) -> None:
    """Replace `file` by `content` as a whole: after a kill it is the old or the new one.

    Raises:
        OSError: it cannot be written; the old file stays as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    try:
        with part.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, file)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def save_checkpoint(folder: Path, run: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write the state of run `run` (see `run_fingerprint`) into `folder`.

    Raises:
        OSError: it cannot be written.
    """
    content = io.BytesIO()
    stored: dict[str, Any] = {_RUN_KEY: np.array(run), **arrays}
    np.savez(content, **stored)
    before = "the checkpoint before this one is kept"
    kept = before if has_checkpoint(folder) else "no checkpoint was written before this one"
    with explain_full_disk(folder, content.tell(), kept):
        write_atomically(folder / CHECKPOINT_NAME, content.getvalue())


def has_checkpoint(folder: Path) -> bool:
    """Whether a run left its state in `folder`."""
    return (folder / CHECKPOINT_NAME).exists()


def load_checkpoint(folder: Path, run: str) -> Arrays | None:
    """The state that run `run` left in `folder`; None where it left none.

    Raises:
        ValueError: the file is of another run, or damaged.
    """
    file = folder / CHECKPOINT_NAME
    if not has_checkpoint(folder):
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        found = str(arrays.pop(_RUN_KEY))
    except (ValueError, KeyError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(
            f"{file}: expected the checkpoint of an identification run, got a file that cannot be "
            f"read ({error}): remove it and start again without --resume"
        ) from None
    if found != run:
        raise ValueError(
            f"{file}: expected the checkpoint of this run (fingerprint {run}), found that of another "
            f"({found}): another model, method or setting; use the same ones, or another --out"
        )
    return arrays


def remove_checkpoint(folder: Path) -> None:
    """Remove the state, at the end of a run."""
    (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
