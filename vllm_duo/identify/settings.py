"""Settings of an identification run: the one place where they are read and checked."""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MethodName = Literal["gates", "retrieval-score", "induction", "on-the-fly", "exclusive"]
Aggregation = Literal["max", "mean"]
NeedleMatch = Literal["exact", "anywhere"]
KeyStyle = Literal["digits", "words"]
Kernel = Literal["sdpa", "flex"]


class IdentifySettings(BaseModel):
    """What a run does; saved in the pattern's config.json. Sizes and lengths are in tokens.

    Attributes:
        method: which method.
        seed: of every choice; two runs with the same settings give the same pattern.
        device: torch device, for example cpu or cuda:0; None takes cuda where there is one.
        dtype: numbers of the model's weights and activations; None is bfloat16 on a GPU, else
            float32.
        sink_size: first tokens that a streaming head keeps; also written as deploy_sink_size.
        recent_size: last tokens that a streaming head keeps; also written as deploy_recent_size.
        max_length: longest sample; None is 2,048, or the model's own limit where that is less.
        min_length: shortest sample; None is the larger of an eighth of max_length and twice what a
            streaming head keeps.
        samples: samples of the forward-only methods; None is the method's own default.
        steps: optimiser steps of `gates`.
        batch_size: samples a step of `gates`.
        lr: highest learning rate of `gates`.
        reg_weight: weight of the sum of the gates in the loss.
        keys: pass keys in a sample.
        key_style: what a key is made of: decimal digits, or words of the tokenizer's vocabulary.
        key_length: digits or words of a key.
        text: file whose text is the haystack; None is made text.
        gqa: how the scores of a group's query heads become that of its KV head.
        needle_match: `retrieval-score`: where a head's strongest attention must lie to count.
        induction_share: `induction`: share of the heads that the induction score picks.
        echo_share: `induction`: share of the heads that the echo score picks.
        source: `exclusive`: folder of the pattern that is made layer-exclusive.
        kernel: streaming attention by blocks through scaled_dot_product_attention, or through
            flex_attention.
        check_samples: held-back samples of the self-check; 0 leaves it out.
        check_length: their length; None is max_length.
        check_sparsity: sparsity at which the chosen pattern is judged.
        checkpoint_every: steps or samples between two checkpoints.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: MethodName = "gates"
    seed: int = 0
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    sink_size: int = Field(64, ge=0)
    recent_size: int = Field(256, ge=1)
    max_length: int | None = Field(None, ge=16)
    min_length: int | None = Field(None, ge=16)
    samples: int | None = Field(None, ge=1)
    steps: int = Field(500, ge=1)
    batch_size: int = Field(1, ge=1)
    lr: float = Field(0.02, gt=0.0)
    reg_weight: float = Field(0.05, ge=0.0)
    keys: int = Field(1, ge=1, le=20)
    key_style: KeyStyle = "digits"
    key_length: int = Field(5, ge=1, le=64)
    text: Path | None = None
    gqa: Aggregation = "max"
    needle_match: NeedleMatch = "exact"
    induction_share: float = Field(0.14, gt=0.0, le=1.0)
    echo_share: float = Field(0.01, ge=0.0, le=1.0)
    source: Path | None = None
    kernel: Kernel = "sdpa"
    check_samples: int = Field(40, ge=0)
    check_length: int | None = Field(None, ge=16)
    check_sparsity: float = Field(0.5, ge=0.0, le=1.0)
    checkpoint_every: int = Field(10, ge=1)

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.min_length and self.max_length and self.min_length > self.max_length:
            raise ValueError(
                f"min_length {self.min_length} is above max_length {self.max_length}: lower it"
            )
        if (self.source is not None) != (self.method == "exclusive"):
            needs = "needs a pattern to start from (--from DIR)"
            raise ValueError(
                f"method exclusive {needs}"
                if self.source is None
                else f"a pattern to start from is for method exclusive, got {self.method}"
            )
        return self


def make_settings(values: dict[str, Any], config: Path | None = None) -> IdentifySettings:
    """Settings from a config file, overridden by `values`.

    Args:
        values: settings by name; None leaves a setting to the file or its default.
        config: JSON or TOML file with an object of settings.

    Raises:
        ValueError: the file cannot be read, or a setting is unknown or impossible; all at once.
    """
    merged = {} if config is None else read_config(config)
    merged.update({key: value for key, value in values.items() if value is not None})
    try:
        return IdentifySettings(**merged)
    except ValidationError as error:
        raise ValueError("identify: " + "; ".join(map(_explain, error.errors()))) from None


def read_config(file: Path) -> dict[str, Any]:
    """The settings in a .json or .toml file, or in a finished pattern's config.json.

    Raises:
        ValueError: no such file, or its text is no object of settings.
    """
    try:
        text = file.read_text(encoding="utf-8")
        found = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ValueError(
            f"--config {file}: expected a readable JSON or TOML file, got {error.strerror}"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"--config {file}: expected JSON, or TOML in a file named .toml, got text that does "
            f"not parse ({error})"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(
            f"--config {file}: expected an object of settings, got {type(found).__name__}"
        )
    settings = found.get("settings", found)
    return dict(settings) if isinstance(settings, dict) else found


def _explain(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, IdentifySettings.model_fields, 1)
        return f"{name}: unknown setting" + (f" (did you mean {close[0]}?)" if close else "")
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}: {message}, got {error['input']!r}" if name else message
