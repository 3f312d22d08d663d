"""What ``benchmarks.serve`` writes to ``results.json``, and the report reads; all times in ms."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Quantiles(_Frozen):
    """Of all samples of a kind."""

    median: float
    p95: float
    p99: float
    mean: float
    samples: int = Field(description="how many samples there were")


class Spread(_Frozen):
    """Of one figure over the rounds."""

    median: float
    low: float = Field(description="lowest round")
    high: float = Field(description="highest round")


class ServerCounts(_Frozen):
    """What the server's /metrics said during one run."""

    samples: int = Field(description="looks at the gauges; the peaks are of these")
    peak_kv_share: float = Field(
        description="share of the KV pool that running requests held, both classes of heads; the "
        "pools of all sides have the same bytes"
    )
    peak_running: int = Field(description="requests that ran at once")
    peak_waiting: int = Field(description="requests that waited for a place")
    preemptions: int = Field(description="requests that lost their place")
    prefix_queried_tokens: int = Field(description="prompt tokens looked up in the prefix cache")
    prefix_hit_tokens: int = Field(description="of these, found")


class Run(_Frozen):
    """One point on one side in one round; the raw samples are in ``client_file``."""

    side: str
    point: str = Field(description="the point's key")
    round: int = Field(description="from 0")
    started: str = Field(description="UTC, ISO 8601")
    duration_s: float = Field(description="from the first request to the last answer")
    requests: int = Field(description="all answered, pass-key requests included")
    input_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: Quantiles = Field(description="time to the first token")
    tpot_ms: Quantiles = Field(description="time per output token after the first, by request")
    itl_ms: Quantiles = Field(description="gaps between tokens")
    e2e_ms: Quantiles = Field(description="from sending to the last token")
    server: ServerCounts
    passkeys_asked: int
    passkeys_right: int
    idle_servers_cpu_s: float = Field(description="processor time of the other servers meanwhile")
    client_command: list[str]
    client_file: str = Field(description="results of vllm bench serve, relative to the run folder")
    requests_file: str = Field(description="its dataset, likewise")


class ServedSide(_Frozen):
    """One server, as it was started."""

    side: str
    sparsity: float | None = Field(description="share of the KV heads that stream; null: stock")
    command: list[str]
    max_model_len: int
    kv_tokens: int | None = Field(description="tokens that the KV pool holds, as vLLM logs it")
    concurrent_requests: float | None = Field(description="longest requests at once, likewise")
    concurrent_request_tokens: int | None = Field(description="the length of these")


class GateSide(_Frozen):
    """Pass keys asked one by one, without load."""

    side: str
    asked: int
    right: int
    lost: int = Field(description="wrong where stock's answer is right")


class Gate(_Frozen):
    """Whether the answers are right; no figures while they are not."""

    passed: bool
    compared_tokens: int = Field(
        description="greedy tokens of stock and of duo with every head a retrieval head"
    )
    near_ties: int = Field(
        description="answers that part where stock's log-probabilities differ by no more than "
        "gate_tie_nats; compared up to there"
    )
    differences: list[str] = Field(description="answers that part elsewhere, in words")
    passkeys: list[GateSide]
    judges_passkeys: bool = Field(
        description="whether the model finds pass keys with full attention: else none are judged"
    )


class SideAtPoint(_Frozen):
    """One side's rounds at one point; quantiles are over the samples of all rounds."""

    side: str
    rounds: int
    output_tokens_per_s: Spread
    total_tokens_per_s: Spread
    ttft_ms: Quantiles
    tpot_ms: Quantiles
    itl_ms: Quantiles
    e2e_ms: Quantiles
    median_tpot_ms: Spread = Field(description="each round's median")
    median_ttft_ms: Spread = Field(description="likewise")
    peak_kv_share: float
    peak_running: int
    preemptions: int = Field(description="of all rounds")
    prefix_hit_rate: float | None = Field(description="hit tokens / queried tokens; null: no query")
    passkeys_asked: int
    passkeys_right: int
    times_stock_output: Spread | None = Field(
        description="output tokens/s over stock's, round by round; null for stock itself"
    )


class PointResults(_Frozen):
    """One workload under one load."""

    key: str
    workload: str
    prompt_tokens: int = Field(description="0: as in the dataset")
    output_tokens: int
    requests: int = Field(description="per round, pass-key requests apart")
    rate: float | None = Field(description="requests a second, open loop")
    concurrency: int | None = Field(description="requests in flight, closed loop")
    sides: list[SideAtPoint] = Field(description="those with at least one round, stock first")


class ServeResults(_Frozen):
    """The whole file."""

    schema_version: Literal[1] = 1
    kind: Literal["serve"] = "serve"
    complete: bool = Field(description="whether every round of every point is in")
    settings: dict[str, Any] = Field(description="as in settings.json")
    versions: dict[str, str | int] = Field(description="versions, hardware and the command")
    gate: Gate
    sides: list[ServedSide] = Field(description="the latest start of each")
    points: list[PointResults]
