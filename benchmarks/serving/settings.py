"""What one serving benchmark measures; saved as ``settings.json`` in its run folder."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Workload = Literal["random", "shared-prefix", "multi-turn", "documents", "dataset"]
TURNS = 4
"""Of a conversation in multi-turn."""
STOCK = "stock"
GATE_SIDE = "duo-0"
"""Duo with every head a retrieval head: must give stock's tokens."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Point(_Frozen):
    """One workload under one load.

    Attributes:
        workload: where the prompts come from, see ``workloads.py``.
        prompt_tokens: of each request, of the last turn with multi-turn; 0 with "dataset", whose
            prompts are as long as they are.
        output_tokens: that each request generates.
        requests: sent in each round, the pass-key requests apart.
        rate: open loop: requests a second, arriving as a Poisson process.
        concurrency: closed loop: requests in flight.
    """

    workload: Workload
    prompt_tokens: int = Field(ge=0)
    output_tokens: int = Field(ge=1)
    requests: int = Field(ge=1)
    rate: Positive | None = None
    concurrency: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _refuse_impossible(self) -> Self:
        if (self.rate is None) == (self.concurrency is None):
            raise ValueError("a point has either a rate or a concurrency: give one of them")
        if self.workload == "multi-turn" and self.rate is not None:
            raise ValueError(
                "multi-turn: expected a closed loop (a turn waits for the one before it), got a "
                "rate: give concurrencies"
            )
        if self.workload == "multi-turn" and self.requests < TURNS * (self.concurrency or 1):
            raise ValueError(
                f"multi-turn: expected at least {TURNS} requests for each one in flight, so that a "
                f"turn is sent after the answer to the one before it, got {self.requests} requests "
                f"and {self.concurrency} in flight: raise --requests, or lower --concurrencies"
            )
        if (self.workload == "dataset") != (self.prompt_tokens == 0):
            raise ValueError("prompt_tokens is 0 for the workload dataset, and for no other")
        return self

    @property
    def load(self) -> str:
        """The load in words."""
        return f"{self.rate:g}/s" if self.rate is not None else f"{self.concurrency} in flight"

    @property
    def key(self) -> str:
        """Name of the point in file names."""
        load = f"rate{self.rate:g}" if self.rate is not None else f"closed{self.concurrency}"
        return f"{self.workload}-{self.prompt_tokens}-{self.output_tokens}-{load}"


class Settings(_Frozen):
    """One benchmark.

    Attributes:
        model: folder or Hugging Face id.
        pattern: of the heads, as in "duo" of ``--additional-config``; None: as the server finds it.
        sparsities: one duo server each.
        points: in the order in which they are measured.
        rounds: how often each point is measured on each side, with fresh prompts.
        seed: of all prompts and arrivals.
        passkey_share: pass-key requests, as a share of a point's requests.
        documents: folder with the texts of the workload "documents".
        dataset: JSONL file of the workload "dataset".
        enforce_eager: both sides without torch.compile and graphs.
        server_args: further arguments of ``vllm serve``, for every side.
        env: environment variables of every server.
        servers: "resident": all stay up and are loaded in turns; "in-turn": one is up at a time;
            "auto": in turn where there is an NVIDIA GPU, whose memory one server takes whole.
        port: of the first server, the next ones follow; None: free ones.
        gate_prompts: greedy answers that the gate compares.
        gate_tie_nats: a differing token passes if stock's log-probability of it is so near to that of
            its own; for bfloat16 and float16, whose rounding swaps tokens that are nearly equal.
        point_timeout_s: longest that one point may take on one side.
    """

    model: str
    pattern: str | None = None
    sparsities: tuple[Share, ...] = Field(default=(0.5,), min_length=1)
    points: tuple[Point, ...] = Field(min_length=1)
    rounds: int = Field(default=3, ge=1)
    seed: int = 0
    passkey_share: Share = 0.125
    documents: str | None = None
    dataset: str | None = None
    enforce_eager: bool = False
    server_args: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    servers: Literal["auto", "resident", "in-turn"] = "auto"
    port: int | None = Field(default=None, ge=1, le=65_000)
    gate_prompts: int = Field(default=4, ge=1)
    gate_tie_nats: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    point_timeout_s: Positive = 1800.0

    @model_validator(mode="after")
    def _refuse_impossible(self) -> Self:
        wrong = []
        used = {point.workload for point in self.points}
        for name, flag in (("documents", "--documents DIR"), ("dataset", "--dataset FILE")):
            if (name in used) != (getattr(self, name) is not None):
                wrong.append(f"the workload {name!r} and {flag} go together: give both or none")
        for name, values in (
            ("sparsity", self.sparsities),
            ("point", [point.key for point in self.points]),
        ):
            twice = sorted({str(value) for value in values if list(values).count(value) > 1})
            if twice:
                wrong.append(f"each {name} can be measured once, got twice: {', '.join(twice)}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the servers that are measured, stock first."""
        return (STOCK, *(duo_side(sparsity) for sparsity in self.sparsities))

    def sparsity_of(self, side: str) -> float | None:
        """Share of the KV heads that stream; None for stock."""
        if side == STOCK:
            return None
        return 0.0 if side == GATE_SIDE else self.sparsities[self.sides.index(side) - 1]

    def serve_arguments(self, side: str) -> list[str]:
        """Arguments of ``vllm serve`` after the model, but for host and port."""
        import json

        arguments = ["--served-model-name", "benchmark", *self.server_args]
        if self.enforce_eager:
            arguments.append("--enforce-eager")
        sparsity = self.sparsity_of(side)
        if sparsity is not None:
            duo: dict[str, Any] = {"sparsity": sparsity}
            if self.pattern is not None:
                duo["pattern"] = self.pattern
            arguments += ["--attention-backend", "duo"]
            arguments += ["--additional-config", json.dumps({"duo": duo})]
        return arguments

    def passkeys(self, point: Point) -> int:
        """Pass-key requests of a round of a point."""
        return math.ceil(point.requests * self.passkey_share)


def duo_side(sparsity: float) -> str:
    """Name of the duo server with that sparsity."""
    return f"duo-{sparsity:g}"
