"""The options of ``vllm-duo identify``, in groups; None: as in ``--config``, else the default."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from vllm_duo.cli.option_groups import option


class Method(StrEnum):
    """The identification methods."""

    GATES = "gates"
    RETRIEVAL_SCORE = "retrieval-score"
    INDUCTION = "induction"
    ON_THE_FLY = "on-the-fly"
    EXCLUSIVE = "exclusive"


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """How heads are found."""

    method: Annotated[Method | None, option("Default: gates.", "--method")] = None
    source: Annotated[
        Path | None, option("With --method exclusive: the pattern to start from.", "--from")
    ] = None


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run begins, and where it computes."""

    resume: Annotated[
        bool, option("Go on where a run with the same settings was ended.", "--resume")
    ] = False
    config: Annotated[
        Path | None, option("JSON or TOML file of settings; options here win.", "--config")
    ] = None
    checkpoint_every: Annotated[
        int | None, option("Steps or samples between checkpoints.", "--checkpoint-every")
    ] = None
    ray: Annotated[
        str | None, option("Spread a forward-only method: local, or a cluster's address.", "--ray")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How the model computes."""

    seed: Annotated[int | None, option("Of every choice. Default: 0.", "--seed")] = None
    device: Annotated[str | None, option("cpu, cuda, cuda:1 ...", "--device")] = None
    dtype: Annotated[
        str | None, option("float32, bfloat16 or float16. Default: bfloat16 on a GPU.", "--dtype")
    ] = None
    kernel: Annotated[
        str | None, option("Streaming attention: sdpa (default) or flex.", "--kernel")
    ] = None


@dataclass(frozen=True, kw_only=True)
class StreamingOptions:
    """What streaming heads keep, in tokens."""

    sink_size: Annotated[
        int | None, option("First tokens that streaming heads keep. Default: 64.", "--sink-size")
    ] = None
    recent_size: Annotated[
        int | None, option("Last tokens that they keep. Default: 256.", "--recent-size")
    ] = None


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The texts, and the pass keys that are hidden in them."""

    max_length: Annotated[
        int | None, option("Tokens of the longest sample. Default: 2048.", "--max-length")
    ] = None
    min_length: Annotated[int | None, option("Tokens of the shortest sample.", "--min-length")] = (
        None
    )
    samples: Annotated[int | None, option("Samples of the forward-only methods.", "--samples")] = (
        None
    )
    text: Annotated[
        Path | None, option("Text file to hide the keys in. Default: made text.", "--text")
    ] = None
    keys: Annotated[int | None, option("Pass keys a sample. Default: 1.", "--keys")] = None
    key_style: Annotated[
        str | None, option("digits, or words of the tokenizer's vocabulary.", "--key-style")
    ] = None
    key_length: Annotated[
        int | None, option("Digits or words of a key. Default: 5.", "--key-length")
    ] = None


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    """``--method gates``, which trains a gate for each head."""

    steps: Annotated[int | None, option("Optimiser steps of gates. Default: 500.", "--steps")] = (
        None
    )
    batch_size: Annotated[
        int | None, option("Samples a step of gates. Default: 1.", "--batch-size")
    ] = None
    lr: Annotated[float | None, option("Learning rate of gates. Default: 0.02.", "--lr")] = None
    reg_weight: Annotated[
        float | None, option("Weight of the gates' sum in the loss. Default: 0.05.", "--reg-weight")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """The methods that score heads by what they attend to."""

    gqa: Annotated[
        str | None, option("Query heads to KV head: max (default) or mean.", "--gqa")
    ] = None
    needle_match: Annotated[
        str | None,
        option("retrieval-score: exact (the paper's, default) or anywhere.", "--needle-match"),
    ] = None
    induction_share: Annotated[
        float | None, option("induction: default 0.14.", "--induction-share")
    ] = None
    echo_share: Annotated[float | None, option("induction: default 0.01.", "--echo-share")] = None


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """The self-check of what was found."""

    check_samples: Annotated[
        int | None, option("Held-back samples of the self-check; 0: none.", "--check-samples")
    ] = None
    check_length: Annotated[
        int | None, option("Their tokens. Default: --max-length.", "--check-length")
    ] = None
    check_sparsity: Annotated[
        float | None, option("Sparsity that is judged. Default: 0.5.", "--check-sparsity")
    ] = None
