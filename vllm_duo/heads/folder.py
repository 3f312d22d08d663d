"""The pattern folder on disk: full_attention_heads.tsv (L x Hkv values) and config.json.

Source: DuoAttention, arXiv:2410.10819, `attn_patterns` of its repository.
"""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

TSV_NAME = "full_attention_heads.tsv"
CONFIG_NAME = "config.json"

# Training leaves values slightly outside [0, 1]; more than this is another kind of file.
MIN_VALUE, MAX_VALUE = -0.01, 1.01

_REMEDY = "correct it or make the pattern again"


def read_folder(folder: Path) -> tuple[npt.NDArray[np.float64], dict[str, Any]]:
    """Read the raw values, [L, Hkv] float64, and the metadata, {} without a config.json.

    Raises:
        ValueError: the folder or the TSV is missing; the TSV is empty or ragged, or has a cell that
            is no number, NaN or outside [-0.01, 1.01]; config.json is not a JSON object.
    """
    if not os.path.isdir(folder):  # False for a name that no folder can have, where Path's raises
        found = "a file" if os.path.exists(folder) else "nothing there"
        raise ValueError(
            f"head pattern {folder}: expected a folder with {TSV_NAME}, found {found}: "
            "pass an existing pattern folder (pattern=...)"
        )
    return _read_tsv(folder / TSV_NAME), _read_config(folder / CONFIG_NAME)


def write_folder(folder: Path, values: npt.NDArray[np.float64], metadata: dict[str, Any]) -> None:
    """Write [L, Hkv] values in the published format, byte for byte, and the metadata.

    Raises:
        OSError: the folder cannot be made or written.
        TypeError: `metadata` holds something that JSON cannot.
    """
    config = json.dumps(metadata, indent=2, ensure_ascii=False) + "\n"
    table = io.BytesIO()
    np.savetxt(table, values, delimiter="\t")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TSV_NAME).write_bytes(table.getvalue())
    (folder / CONFIG_NAME).write_bytes(config.encode())


def find_out_of_range(values: npt.NDArray[np.float64]) -> tuple[int, int] | None:
    """(layer, head) of the first NaN or value outside [-0.01, 1.01] of [L, Hkv], or None."""
    bad = np.argwhere(~((values >= MIN_VALUE) & (values <= MAX_VALUE)))  # NaN compares False
    return (int(bad[0, 0]), int(bad[0, 1])) if len(bad) else None


def _read_tsv(file: Path) -> npt.NDArray[np.float64]:
    """Read [L, Hkv] values; blank lines may stand at the end only, so line = layer + 1."""
    if not file.is_file():
        raise ValueError(
            f"{file}: expected a table of layers x KV heads, found no such file: "
            "pass a pattern folder that holds it (pattern=...)"
        )
    text = file.read_text(encoding="utf-8-sig", errors="replace").rstrip("\n")
    if not text.strip():
        raise ValueError(
            f"{file}: expected one line per layer, found an empty file: make the pattern again"
        )
    rows: list[list[float]] = []
    for line, row in enumerate(text.split("\n"), start=1):
        cells = [
            _parse_cell(cell, f"{file}, line {line}, column {column}")
            for column, cell in enumerate(row.split("\t"), start=1)
        ]
        if rows and len(cells) != len(rows[0]):
            raise ValueError(
                f"{file}, line {line}: expected {len(rows[0])} values as in line 1, found "
                f"{len(cells)}: give every layer one value per KV head, separated by tabs"
            )
        rows.append(cells)
    values = np.array(rows, dtype=np.float64)
    if bad := find_out_of_range(values):
        raise ValueError(
            f"{file}, line {bad[0] + 1}, column {bad[1] + 1}: expected a value in "
            f"[{MIN_VALUE}, {MAX_VALUE}], got {float(values[bad])!r}: {_REMEDY}"
        )
    return values


def _parse_cell(cell: str, where: str) -> float:
    try:
        if "_" in cell:  # float() takes 0_5 for 5
            raise ValueError
        return float(cell)
    except ValueError:
        raise ValueError(f"{where}: expected a number, got {cell!r}: {_REMEDY}") from None


def _read_config(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # JSON or UTF-8
        raise ValueError(
            f"{file}: expected a JSON object, got text that does not parse ({error}): "
            "correct or remove it"
        ) from None
    if not isinstance(config, dict):
        raise ValueError(
            f"{file}: expected a JSON object, got {type(config).__name__}: correct or remove it"
        )
    return config
