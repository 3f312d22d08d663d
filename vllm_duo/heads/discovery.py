"""Find the head pattern of a model: named by the user, beside the model, or shipped."""

import difflib
import os
import re
from pathlib import Path

from vllm_duo.heads.folder import TSV_NAME
from vllm_duo.heads.pattern import HeadPattern

PUBLISHED = Path(__file__).parent / "published"
MODEL_PATTERN_FOLDER = "duo_pattern"

# Other names of the very checkpoint that a shipped pattern was made for, in lower case. Base
# models, other fine-tunes, other context extensions and quantised copies do not belong here: their
# heads were never measured, so using a pattern for them must be the user's choice (pattern=NAME).
ALIASES = {
    # Meta renamed the repository; the old address redirects to the new one.
    "llama-3.1-8b-instruct": "Meta-Llama-3.1-8B-Instruct",
}

# A snapshot in Hugging Face's cache: .../models--ORG--NAME/snapshots/REVISION
_HF_CACHE = re.compile(r"models--(?:[^/]+--)?(?P<name>[^/]+)/snapshots/[^/]+$")


def list_shipped() -> list[str]:
    """Names of the patterns in this package, sorted."""
    return sorted(folder.parent.name for folder in PUBLISHED.glob(f"*/{TSV_NAME}"))


def find_pattern(
    pattern: str | None, model: str, num_layers: int, num_kv_heads: int
) -> HeadPattern:
    """Load the head pattern for a model and check its shape; never guesses from the shape alone.

    With `pattern`: that folder (~ is expanded), else the shipped pattern of that name. An existing
    folder wins over a shipped pattern of the same name. Without: `MODEL/duo_pattern/` if it
    exists, else the shipped pattern whose name is the last component of `model`. Names compare
    without regard to case and through `ALIASES`.

    Args:
        pattern: folder, or name of a shipped pattern; None to look it up from `model`.
        model: local path or Hugging Face id; of a snapshot in Hugging Face's cache, the
            repository's name counts.
        num_layers: attention layers of the model.
        num_kv_heads: KV heads of one layer, before any tensor-parallel split.

    Raises:
        ValueError: no pattern is found, it cannot be read, or its shape is not the model's.
    """
    folder = _default_folder(model) if pattern is None else pattern_folder(pattern)
    found = HeadPattern.load(folder)
    found.validate_for(num_layers, num_kv_heads, model)
    return found


def pattern_folder(pattern: str) -> Path:
    """The folder that a user names: an existing one, else that of a shipped pattern.

    Args:
        pattern: folder (~ is expanded), or name of a shipped pattern in any case.

    Raises:
        ValueError: there is neither.
    """
    shipped = _shipped_name(pattern)
    folder = Path(os.path.expanduser(pattern))
    if pattern.strip() and os.path.exists(folder):
        if shipped and not (folder / TSV_NAME).exists():
            raise ValueError(
                f"pattern {pattern!r}: expected a folder with {TSV_NAME}, found "
                f"{folder.absolute()} without it: rename that, or for the shipped pattern of this "
                f"name set pattern={str(PUBLISHED / shipped)!r}"
            )
        return folder
    if shipped:
        return PUBLISHED / shipped
    close = difflib.get_close_matches(pattern.lower(), [name.lower() for name in list_shipped()], 1)
    hint = f" (did you mean {_shipped_name(close[0])!r}?)" if close else ""
    raise ValueError(
        f"pattern {pattern!r}: expected a folder or the name of a shipped pattern "
        f"({', '.join(list_shipped())}), found neither: correct the name{hint} or give an existing "
        "folder (pattern=...)"
    )


def _default_folder(model: str) -> Path:
    beside = Path(model) / MODEL_PATTERN_FOLDER
    if os.path.exists(beside):
        return beside
    if shipped := _shipped_name(_checkpoint_name(model)):
        return PUBLISHED / shipped
    raise ValueError(
        f"no head pattern for model {model!r}: expected the folder {beside} or a shipped pattern "
        f"of the model's name ({', '.join(list_shipped())}), found neither, and nothing falls back "
        "to a full cache silently: make one with `vllm-duo identify MODEL "
        "--out DIR` and set pattern=DIR, or, if the model is a copy of one of those named, set "
        "pattern=NAME"
    )


def _checkpoint_name(model: str) -> str:
    """Last component of a path or Hugging Face id; the repository's name in Hugging Face's cache.

    Example: org/Name and /models/Name/ give Name; "." gives the name of the working directory.
    """
    path = Path(model)
    if os.path.isdir(path):
        path = path.absolute()  # links stay: in the cache their targets carry no names
    if cached := _HF_CACHE.search(path.as_posix()):
        return cached["name"]
    return path.name


def _shipped_name(name: str) -> str | None:
    """The shipped pattern with this name or alias, whatever its case."""
    by_name = {shipped.lower(): shipped for shipped in list_shipped()}
    return by_name.get(name.lower()) or ALIASES.get(name.lower())
