"""Settings: the one place where `--additional-config '{"duo": {...}}'` is read and resolved."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from vllm_duo.heads import HeadPattern, HeadSelection
from vllm_duo.heads.folder import CONFIG_NAME
from vllm_duo.windows import Windows, chosen_layers

SECTION = "duo"
DEFAULT_SPARSITY = 0.5
DEFAULT_SINK_SIZE = 64
DEFAULT_RECENT_SIZE = 256
DEFAULT_SNAPSHOT_INTERVAL = 1024
# sink_size + recent_size + 1 fits in int32, the type of positions and table entries.
MAX_SIZE_TOKENS = 2**30 - 1

BALANCED_THRESHOLD = (
    "balance and threshold: expected at most one of them, since a threshold streams no fixed share: "
    "set sparsity instead"
)

Source = Literal["setting", "pattern", "default"]


def _refuse_lookalikes(value: object) -> object:
    """Keep from pydantic's number parsing what it would take for a number: True, "64"."""
    if isinstance(value, (bool, str, bytes)):
        raise ValueError("not a number")
    return value


_Share = Annotated[
    float, BeforeValidator(_refuse_lookalikes), Field(ge=0, le=1, allow_inf_nan=False)
]
_SinkSize = Annotated[int, BeforeValidator(_refuse_lookalikes), Field(ge=0, le=MAX_SIZE_TOKENS)]
_RecentSize = Annotated[int, BeforeValidator(_refuse_lookalikes), Field(ge=1, le=MAX_SIZE_TOKENS)]
_Interval = Annotated[int, BeforeValidator(_refuse_lookalikes), Field(ge=1, le=MAX_SIZE_TOKENS)]

_Flag = Annotated[bool, Field(strict=True)]
RetrievalPrefill = Literal["auto", "triton", "flash-attn", "flashinfer"]
StreamingCacheDtype = Literal["same", "model"]

_SIZE_CHECKS = {"sink_size": TypeAdapter(_SinkSize), "recent_size": TypeAdapter(_RecentSize)}
_ALLOWED = {
    "pattern": "a pattern folder or the name of a shipped pattern",
    "sparsity": "a number from 0 to 1",
    "threshold": "a number from 0 to 1",
    "sink_size": f"a whole number of tokens from 0 to {MAX_SIZE_TOKENS}",
    "recent_size": f"a whole number of tokens from 1 to {MAX_SIZE_TOKENS}",
    "snapshot_interval": f"a whole number of tokens from 1 to {MAX_SIZE_TOKENS}",
    "streaming_cache_dtype": "same or model",
    "balance": "true or false",
    "retrieval_prefill": "auto, triton, flash-attn or flashinfer",
    "untested_gpu": "true or false",
    "untested_model_runner": "true or false",
}


class DuoConfig(BaseModel):
    """The settings as given; None means not given. Read it with `from_additional_config`.

    Attributes:
        pattern: folder, or name of a shipped pattern; None: looked up from the model.
        sparsity: share of the KV heads that stream; not together with `threshold`.
        threshold: a head with this pattern value or above is a retrieval head.
        sink_size: tokens at the start that streaming heads keep.
        recent_size: most recent tokens that streaming heads keep, the current one included.
        snapshot_interval: with prefix caching, tokens between the regular snapshots of streaming
            heads, rounded up to whole blocks. Not given, it is at least the model's own sliding window.
        streaming_cache_dtype: with a quantised KV cache, what the streaming heads keep: "same", as the
            retrieval heads; "model", numbers of the model's own dtype.
        balance: under tensor parallelism, whether every rank streams the same share of its heads; not
            together with `threshold`.
        retrieval_prefill: on a GPU, which kernel serves the retrieval heads of prefills.
        untested_gpu: whether a server may start on a GPU, where this release has never run.
        untested_model_runner: whether a server may start with vLLM's model runner V2.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: Annotated[str, Field(strict=True, pattern=r"\S")] | None = None
    sparsity: _Share | None = None
    threshold: _Share | None = None
    sink_size: _SinkSize | None = None
    recent_size: _RecentSize | None = None
    snapshot_interval: _Interval = DEFAULT_SNAPSHOT_INTERVAL
    streaming_cache_dtype: StreamingCacheDtype = "same"
    balance: _Flag = False
    retrieval_prefill: RetrievalPrefill = "auto"
    untested_gpu: _Flag = False
    untested_model_runner: _Flag = False

    @model_validator(mode="after")
    def _refuse_two_cuts(self) -> Self:
        if self.sparsity is not None and self.threshold is not None:
            raise ValueError(_two_cuts(self.sparsity, self.threshold))
        if self.balance and self.threshold is not None:
            raise ValueError(BALANCED_THRESHOLD)
        return self

    @classmethod
    def from_additional_config(cls, additional_config: Mapping[str, Any] | None) -> Self:
        """Read the "duo" key of vLLM's `additional_config`; without one, all defaults.

        Raises:
            ValueError: once, for all bad keys together: each with what was found and what is
                allowed, an unknown key with the nearest known one.
        """
        if additional_config is None:
            return cls()
        section = _object("--additional-config", additional_config).get(SECTION, {})
        section = _object(f'"{SECTION}" in --additional-config', section)
        try:
            return cls.model_validate(dict(section))
        except ValidationError as error:
            problems = _problems(section, error)
        raise ValueError(f'"{SECTION}" in --additional-config: ' + "\n  ".join(problems))


@dataclass(frozen=True)
class ResolvedDuo:
    """The settings in force, after the pattern has had its say.

    Attributes:
        selection: the retrieval and streaming heads.
        sink_size: tokens.
        recent_size: tokens.
        snapshot_interval: tokens between the regular snapshots, with prefix caching.
        streaming_cache_dtype: "model": streaming heads keep the model's own dtype beside a quantised
            cache of the retrieval heads.
        balance: whether every tensor-parallel rank streams the same share of its heads.
        retrieval_prefill: on a GPU, which kernel serves the retrieval heads of prefills.
        cut: which setting made the selection, and `cut_value` its value.
        cut_source: "setting" or "default"; likewise `sink_source` and `recent_source`, which may
            also be "pattern".
    """

    selection: HeadSelection
    sink_size: int
    recent_size: int
    cut: Literal["sparsity", "threshold"]
    cut_value: float
    cut_source: Source
    sink_source: Source
    recent_source: Source
    snapshot_interval: int = DEFAULT_SNAPSHOT_INTERVAL
    streaming_cache_dtype: StreamingCacheDtype = "same"
    balance: bool = False
    retrieval_prefill: RetrievalPrefill = "auto"


def resolve(
    config: DuoConfig,
    pattern: HeadPattern,
    tensor_parallel_size: int = 1,
    windows: Windows = (),
) -> ResolvedDuo:
    """Apply the settings to a pattern: explicit, else the pattern's deploy_ sizes, else defaults.

    The `sink_size`, `recent_size`, `threshold` and `sparsity` in a published config.json are those
    of its training and are not used. A deploy_ size that an explicit setting overrides is not read.

    Args:
        config: the settings.
        pattern: the head pattern.
        tensor_parallel_size: ranks over which `balance` balances.
        windows: the model's own sliding windows by layer. All heads of a layer with one stream; the
            settings cut those of the other layers.

    Raises:
        ValueError: a deploy_ size in the pattern's config.json is not an allowed size, or the KV heads
            cannot be balanced over the ranks.
    """
    sink_size, sink_source = _resolve_size(
        "sink_size", config.sink_size, pattern, DEFAULT_SINK_SIZE
    )
    recent_size, recent_source = _resolve_size(
        "recent_size", config.recent_size, pattern, DEFAULT_RECENT_SIZE
    )
    cut: Literal["sparsity", "threshold"]
    cut_source: Source
    layers = chosen_layers(windows)
    if config.threshold is not None:
        cut, cut_value, cut_source = "threshold", config.threshold, "setting"
        selection = pattern.select(threshold=cut_value, layers=layers)
    else:
        cut_source = "default" if config.sparsity is None else "setting"
        cut_value = DEFAULT_SPARSITY if config.sparsity is None else config.sparsity
        cut = "sparsity"
        ranks = tensor_parallel_size if config.balance else 1
        selection = pattern.select(sparsity=cut_value, balance_ranks=ranks, layers=layers)
    return ResolvedDuo(
        selection=selection,
        sink_size=sink_size,
        recent_size=recent_size,
        cut=cut,
        cut_value=cut_value,
        cut_source=cut_source,
        sink_source=sink_source,
        recent_source=recent_source,
        snapshot_interval=_interval(config, windows),
        streaming_cache_dtype=config.streaming_cache_dtype,
        balance=config.balance,
        retrieval_prefill=config.retrieval_prefill,
    )


def resolve_without_pattern(config: DuoConfig, windows: Windows, num_kv_heads: int) -> ResolvedDuo:
    """The settings of a model whose layers all have a window of their own: every head streams.

    Args:
        config: the settings.
        windows: of every layer.
        num_kv_heads: of a layer.

    Raises:
        ValueError: settings are given that would choose heads, or how much they keep.
    """
    given = {
        key: getattr(config, key)
        for key in ("pattern", "sparsity", "threshold", "sink_size", "recent_size")
        if getattr(config, key) is not None
    }
    if given:
        raise ValueError(
            f'"{SECTION}" in --additional-config: every layer of the model has a sliding window of its '
            f"own ({max(filter(None, windows))} tokens), with which all heads stream: expected none of "
            "the keys pattern, sparsity, threshold, sink_size and recent_size, got "
            f"{', '.join(f'{key}={_shown(value)}' for key, value in given.items())}: remove them"
        )
    return ResolvedDuo(
        selection=HeadPattern.uniform(len(windows), num_kv_heads, 0.0).select(sparsity=1.0),
        sink_size=0,
        recent_size=max(filter(None, windows)),
        cut="sparsity",
        cut_value=1.0,
        cut_source="default",
        sink_source="default",
        recent_source="default",
        snapshot_interval=_interval(config, windows),
        streaming_cache_dtype=config.streaming_cache_dtype,
        balance=config.balance,
        retrieval_prefill=config.retrieval_prefill,
    )


def _interval(config: DuoConfig, windows: Windows) -> int:
    """Tokens between regular snapshots; by default no window is copied more often than once."""
    if "snapshot_interval" in config.model_fields_set:
        return config.snapshot_interval
    return max(config.snapshot_interval, *filter(None, windows), 1)


def _resolve_size(
    key: str, setting: int | None, pattern: HeadPattern, default: int
) -> tuple[int, Source]:
    """Size in tokens for `key` ("sink_size" or "recent_size"), and where it comes from."""
    if setting is not None:
        return setting, "setting"
    deployed = pattern.metadata.get(f"deploy_{key}")
    if deployed is None:
        return default, "default"
    try:
        return _SIZE_CHECKS[key].validate_python(deployed), "pattern"
    except ValidationError:
        file = "head pattern made in memory" if pattern.path is None else pattern.path / CONFIG_NAME
        raise ValueError(
            f"{file}: deploy_{key}: expected {_ALLOWED[key]}, got {_shown(deployed)}: "
            f"correct it, or set {key}"
        ) from None


def _object(where: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(
            f"{where}: expected an object, got {_shown(value)}: "
            f'pass for example {{"{SECTION}": {{"sparsity": 0.5}}}}'
        )
    return value


def _problems(section: Mapping[str, Any], error: ValidationError) -> list[str]:
    """One line for each bad key of the section, in pydantic's order."""
    bad_keys = dict.fromkeys(item["loc"][0] for item in error.errors() if item["loc"])
    found = {str(key): value for key, value in section.items()}
    problems = [_problem(str(key), found.get(str(key))) for key in bad_keys]
    sparsity, threshold = section.get("sparsity"), section.get("threshold")
    if sparsity is not None and threshold is not None:
        problems.append(_two_cuts(sparsity, threshold))
    if section.get("balance") is True and threshold is not None:
        problems.append(BALANCED_THRESHOLD)
    return problems


def _problem(key: str, value: object) -> str:
    if key in _ALLOWED:
        return f"{key}: expected {_ALLOWED[key]}, got {_shown(value)}"
    close = difflib.get_close_matches(key.lower().replace("-", "_"), _ALLOWED, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{key}: unknown key{hint}, got {_shown(value)}: allowed keys are {', '.join(_ALLOWED)}"


def _two_cuts(sparsity: object, threshold: object) -> str:
    return (
        f"sparsity and threshold: expected at most one of them, got sparsity={_shown(sparsity)} "
        f"and threshold={_shown(threshold)}: remove one"
    )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
