"""What ``vllm-duo plan --json`` prints; ``docs/plan.md`` lists it. All bytes are of one rank."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LengthPlan(_Frozen):
    """Requests of one length."""

    tokens: int = Field(description="length of each request")
    blocks: int = Field(description="pool blocks that a request holds")
    held_bytes: int = Field(description="bytes of these blocks")
    needed_bytes: int = Field(description="bytes that the request must keep, whatever the blocks")
    waste: float = Field(
        description="share of the held bytes that is not needed, the last block's rest excluded"
    )
    concurrent_requests: float = Field(description="requests that fit at once, unrounded")
    tokens_that_fit: int = Field(description="tokens of all of them, the last one in part")


class MemoryPlan(_Frozen):
    """What one way of keeping the KV cache costs, and what the pool holds with it."""

    concurrent_requests: float = Field(
        description="requests of max_model_len tokens that fit at once, unrounded"
    )
    tokens_that_fit: int = Field(description="tokens of all of them, the last one in part")
    bytes_per_token: int = Field(
        description="bytes that each token of a request must keep for good: the retrieval heads', "
        "and a draft model's"
    )
    constant_bytes_per_request: int = Field(
        description="bytes that a request must keep however long it is: the streaming heads' sink "
        "and recent tokens"
    )
    waste: float = Field(description="at max_model_len, as in by_length")
    block_bytes: int = Field(description="bytes of a pool block")
    num_blocks: int = Field(description="blocks of the pool; one is vLLM's null block")
    longest_request_tokens: int | None = Field(
        description="longest request that fits the pool alone; null: any length fits"
    )
    by_length: list[LengthPlan] = Field(description="the same for other lengths, ascending")


class PlanSettings(_Frozen):
    """What was planned for."""

    model: str = Field(description="folder or Hugging Face id")
    pattern: str = Field(description="name of the head pattern's folder")
    mask_hash: str = Field(description="of the selected heads")
    sparsity: float = Field(description="share of the KV heads that stream, as it came out")
    cut: Literal["sparsity", "threshold"] = Field(description="the setting that selected the heads")
    cut_value: float = Field(description="its value")
    sink_size: int = Field(description="tokens")
    recent_size: int = Field(description="tokens")
    sliding_layers: int = Field(
        default=0, description="layers with a sliding window of their own that hides something"
    )
    sliding_window: int | None = Field(default=None, description="its tokens; null: none")
    num_layers: int
    num_kv_heads: int = Field(description="of one layer, over all ranks")
    head_size: int
    dtype: str = Field(description="of the model")
    kv_cache_dtype: str = Field(
        description="as given, or for auto what the checkpoint asks for; auto is the model's"
    )
    skipped_layers: list[int] = Field(
        default=[], description="layers whose cache keeps the model's dtype beside a quantised one"
    )
    streaming_cache_dtype: Literal["same", "model"] = Field(
        default="same", description="of the streaming heads: as kv_cache_dtype, or the model's own"
    )
    block_size: int = Field(description="tokens of a retrieval block, --block-size")
    num_speculative_tokens: int = Field(
        default=0, description="drafts of a step, for which a ring has slots; 0 without"
    )
    draft_model: str | None = Field(
        default=None, description="folder or Hugging Face id of the model that drafts"
    )
    draft_kv_cache_dtype: str | None = Field(
        default=None, description="its own kv_cache_dtype, as given; null: the server's"
    )
    max_model_len: int = Field(description="tokens")
    tensor_parallel_size: int
    pipeline_parallel_size: int = 1
    balance: bool = Field(description="whether every rank streams the same share of its heads")
    kv_cache_bytes: int = Field(description="the pool of one rank")


class Plan(MemoryPlan):
    """The memory of a server with duo, and of stock vLLM in the same pool under ``full``."""

    schema_version: Literal[1] = 1
    settings: PlanSettings
    streaming_block_size: int = Field(description="tokens of a streaming block")
    window_block_sizes: list[int] = Field(
        default=[],
        description="tokens of a block of the layers with a sliding window of their own; empty: none",
    )
    streaming_blocks_per_request: int = Field(description="most that a request holds, all bins")
    num_bins: int = Field(description="groups of layers whose streaming heads share a block table")
    times_full_attention: float | None = Field(
        description="concurrent_requests over that of full attention; null: that has no block"
    )
    times_unquantised_full_attention: float | None = Field(
        description="the same over full attention with a KV cache of the model's own dtype"
    )
    tensor_parallel_loss: float = Field(
        description="share of what duo saves against stock on one rank that is lost by splitting the "
        "heads over ranks and stages, at max_model_len; 0 with one rank"
    )
    full: MemoryPlan = Field(description="stock vLLM: every head keeps every token")
    notes: list[str] = Field(description="what to know before relying on the figures")
