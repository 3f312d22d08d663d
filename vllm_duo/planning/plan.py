"""The plan of a server's KV memory, from its flags and the model's config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vllm_duo.config import SECTION
from vllm_duo.drafts import Drafts
from vllm_duo.kv_cache.capacity import Capacity
from vllm_duo.kv_cache.formats import FORMATS, row_bytes
from vllm_duo.kv_cache.layout import Layout
from vllm_duo.model_facts import ModelFacts, draft_refusals, model_refusals
from vllm_duo.planning.checkpoint import Checkpoint, read_checkpoint
from vllm_duo.planning.schema import LengthPlan, MemoryPlan, Plan, PlanSettings
from vllm_duo.server_plan import ServerPlan, make_plan
from vllm_duo.skipped_layers import skipped_layers
from vllm_duo.support import cache_dtype_refusal, draft_model_refusals, refuse
from vllm_duo.windows import describe, in_force, slides_throughout

DTYPES = {"half": "float16", "float": "float32"} | {
    name: name for name in ("float16", "bfloat16", "float32")
}
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
CACHE_DTYPES = ("float16", "bfloat16", *FORMATS)
"""vLLM's ``--kv-cache-dtype`` that can be planned for, beside "auto"."""

AUTO_DTYPE = "bfloat16"
"""What vLLM makes of a float32 checkpoint, or of one that does not say, with ``--dtype auto``."""

FIRST_LENGTH = 1024
"""Tokens of the shortest request that is listed, if no lengths are asked for; then its doubles."""

DEFAULT_BLOCK_SIZE = 128
"""vLLM's ``--block-size`` on CPUs, the platform of this release."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A server's flags.

    Attributes:
        model: folder, or Hugging Face id of a model whose config.json is in the local cache.
        duo: the "duo" section of ``--additional-config``.
        kv_cache_bytes: KV pool of one rank.
        max_model_len: tokens; "auto": the longest that fits the pool; None: the model's own.
        tensor_parallel_size: ranks of a stage.
        pipeline_parallel_size: stages.
        dtype: vLLM's ``--dtype``.
        kv_cache_dtype: vLLM's ``--kv-cache-dtype``.
        skip_layers: vLLM's ``--kv-cache-dtype-skip-layers``.
        block_size: tokens of a retrieval block.
        num_speculative_tokens: drafts of a step, of vLLM's ``--speculative-config``; 0 without.
        draft_model: folder or Hugging Face id of the model that drafts, if one does.
        draft_kv_cache_dtype: ``kv_cache_dtype`` of vLLM's ``--speculative-config``; None: the server's.
        lengths: requests to list, in tokens; none: doubles up to ``max_model_len``.
        language_model_only: vLLM's flag: a multimodal model serves its text alone.
    """

    model: str
    duo: Mapping[str, Any] = field(default_factory=dict)
    kv_cache_bytes: int
    max_model_len: int | Literal["auto"] | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    skip_layers: Sequence[str] = ()
    block_size: int = DEFAULT_BLOCK_SIZE
    num_speculative_tokens: int = 0
    draft_model: str | None = None
    draft_kv_cache_dtype: str | None = None
    lengths: Sequence[int] = ()
    language_model_only: bool = False


def plan_memory(request: PlanRequest) -> Plan:
    """Work out what the server would hold.

    Raises:
        ValueError: no such model, no pattern or one of another shape, or an impossible setting.
        NotImplementedError: duo cannot serve the model; with every reason.
    """
    _check(request)
    checkpoint = read_checkpoint(request.model)
    facts = checkpoint.facts
    if request.language_model_only:
        facts = replace(facts, multimodal=None)
    refuse(list(model_refusals(facts)))
    own_dtype = facts.own_cache.dtype
    if request.kv_cache_dtype == "auto" and own_dtype != "auto":
        request = replace(request, kv_cache_dtype=own_dtype)
    # As the server, which cannot know yet what "auto" will come to.
    longest = _model_length(request, checkpoint)
    server = make_plan(
        {SECTION: request.duo},
        facts.name,
        facts.num_layers,
        facts.num_kv_heads,
        request.tensor_parallel_size,
        request.pipeline_parallel_size,
        in_force(facts.windows or (), longest),
        skipped_layers(request.skip_layers, facts.num_layers, facts.windows or ()),
    )
    dtype = _dtype(request, checkpoint)
    if request.kv_cache_dtype not in ("auto", *CACHE_DTYPES):  # the checkpoint's own
        refuse([str(cache_dtype_refusal(request.kv_cache_dtype, dtype))])
    drafts = _drafts(request, dtype, checkpoint.facts)
    layout = server.layout(
        head_size=facts.head_size,
        block_size=request.block_size,
        max_model_len=longest,
        dtype_bytes=DTYPE_BYTES[dtype],
        row_bytes=row_bytes(request.kv_cache_dtype, facts.head_size),
        drafts=drafts,
    )
    if request.max_model_len == "auto":
        longest = _fitting_length(layout, request.kv_cache_bytes, longest)
    lengths = sorted({*(request.lengths or _doubles(longest)), longest})
    duo = _memory(layout, request.kv_cache_bytes, longest, lengths)
    full = _memory(layout.full_attention, request.kv_cache_bytes, longest, lengths)
    plain = _unquantised(layout, drafts, request.tensor_parallel_size).full_attention
    unquantised = Capacity.of_bytes(plain, request.kv_cache_bytes).concurrent_requests(longest)
    cost, balanced = server.split_costs(layout, longest, drafts)
    return Plan(
        **dict(duo),
        settings=_settings(request, checkpoint, server, dtype, longest),
        streaming_block_size=layout.span.block_size,
        window_block_sizes=sorted(
            {
                layout.span_of(index).block_size
                for index, layers in enumerate(layout.bins)
                if server.windows and server.windows[layers[0]] is not None
            }
        ),
        streaming_blocks_per_request=layout.streaming_blocks(layout.most_slots),
        num_bins=len(layout.bins),
        times_full_attention=_ratio(duo.concurrent_requests, full.concurrent_requests),
        times_unquantised_full_attention=_ratio(duo.concurrent_requests, unquantised),
        tensor_parallel_loss=cost.loss,
        full=full,
        notes=[
            *_notes(request, checkpoint, dtype, duo, longest),
            *_window_notes(server),
            *([cost.describe(balanced)] if server.num_ranks > 1 else []),
        ],
    )


def _check(request: PlanRequest) -> None:
    """Refuse impossible flags, one sentence each."""
    numbers: list[tuple[str, object]] = [
        ("--kv-cache-gib", request.kv_cache_bytes),
        ("--block-size", request.block_size),
        ("--tp", request.tensor_parallel_size),
        ("--pp", request.pipeline_parallel_size),
        ("--max-model-len", request.max_model_len),
        *(("--lengths", length) for length in request.lengths),
    ]
    for name, number in numbers:
        if isinstance(number, int) and number < 1:
            raise ValueError(f"{name}: expected more than 0, got {number}: correct it")
    if request.num_speculative_tokens < 0:
        raise ValueError(
            f"--num-speculative-tokens: expected 0 or more, got {request.num_speculative_tokens}: "
            "correct it"
        )
    if request.draft_model is not None and request.num_speculative_tokens == 0:
        raise ValueError(
            "--draft-model: expected --num-speculative-tokens of 1 or more with it, got 0: give both"
        )
    if request.draft_kv_cache_dtype is not None and request.draft_model is None:
        raise ValueError(
            "--draft-kv-cache-dtype: expected --draft-model with it, got none: give both"
        )
    for name, value, allowed in (
        ("--dtype", request.dtype, DTYPES),
        ("--kv-cache-dtype", request.kv_cache_dtype, CACHE_DTYPES),
        ("--draft-kv-cache-dtype", request.draft_kv_cache_dtype or "auto", CACHE_DTYPES),
    ):
        if value != "auto" and value not in allowed:
            raise ValueError(
                f"{name}: expected one of auto, {', '.join(allowed)}, got {value!r}: correct it"
            )


def _unquantised(layout: Layout, drafts: Drafts, ranks: int) -> Layout:
    """The same heads and blocks with caches of the model's own dtype."""
    token_bytes = drafts.unquantised.token_bytes(ranks)
    shapes = (replace(rank, row_bytes=None, draft_token_bytes=token_bytes) for rank in layout.ranks)
    return replace(layout, ranks=tuple(shapes))


def _drafts(request: PlanRequest, dtype: str, served: ModelFacts) -> Drafts:
    """What speculative decoding adds; a draft model has the numbers of the model that it drafts for."""
    if request.draft_model is None:
        return Drafts(size=request.num_speculative_tokens)
    facts = read_checkpoint(request.draft_model).facts
    reasons = draft_refusals(facts, request.tensor_parallel_size)
    served_with = draft_model_refusals(
        request.pipeline_parallel_size,
        served.multimodal,
        served.own_cache.dtype,
        bool(request.skip_layers),
    )
    refuse([*reasons, *served_with])
    return Drafts(
        size=request.num_speculative_tokens,
        num_layers=facts.num_layers,
        num_kv_heads=facts.num_kv_heads,
        head_size=facts.head_size,
        dtype_bytes=DTYPE_BYTES[dtype],
        row_bytes=row_bytes(
            request.draft_kv_cache_dtype or request.kv_cache_dtype, facts.head_size
        ),
    )


def _dtype(request: PlanRequest, checkpoint: Checkpoint) -> str:
    """The model's numbers as vLLM would choose them."""
    if request.dtype != "auto":
        return DTYPES[request.dtype]
    found = checkpoint.dtype
    return found if found in ("float16", "bfloat16") else AUTO_DTYPE


def _model_length(request: PlanRequest, checkpoint: Checkpoint) -> int:
    """Tokens of the longest request, before a pool shortens it."""
    if isinstance(request.max_model_len, int):
        return request.max_model_len
    if checkpoint.max_model_len is None:
        raise ValueError(
            f"--max-model-len: expected a number of tokens, got none, and config.json of "
            f"{request.model!r} gives none that can be used as it is (no max_position_embeddings, or "
            "a RoPE scaling): give it"
        )
    return checkpoint.max_model_len


def _fitting_length(layout: Layout, pool_bytes: int, longest: int) -> int:
    """What ``--max-model-len auto`` comes to.

    Raises:
        ValueError: not a single token fits.
    """
    found = Capacity.of_bytes(layout, pool_bytes).longest_request()
    if found == 0:
        raise ValueError(
            f"--max-model-len auto: expected a pool for at least one token ("
            f"{(1 + layout.blocks(1)) * layout.block_bytes} bytes), got {pool_bytes} bytes: raise "
            "--kv-cache-gib"
        )
    return longest if found is None else min(found, longest)


def _doubles(longest: int) -> Iterator[int]:
    length = FIRST_LENGTH
    while length < longest:
        yield length
        length *= 2


def _memory(layout: Layout, pool_bytes: int, longest: int, lengths: Sequence[int]) -> MemoryPlan:
    capacity = Capacity.of_bytes(layout, pool_bytes)
    rank = layout.neediest_rank(longest)
    return MemoryPlan(
        concurrent_requests=capacity.concurrent_requests(longest),
        tokens_that_fit=capacity.tokens_that_fit(longest),
        bytes_per_token=rank.paged_token_bytes,
        constant_bytes_per_request=layout.constant_bytes(rank),
        waste=layout.waste(longest),
        block_bytes=layout.block_bytes,
        num_blocks=capacity.num_blocks,
        longest_request_tokens=capacity.longest_request(),
        by_length=[
            LengthPlan(
                tokens=tokens,
                blocks=layout.blocks(tokens),
                held_bytes=layout.held_bytes(tokens),
                needed_bytes=layout.needed_bytes(tokens),
                waste=layout.waste(tokens),
                concurrent_requests=capacity.concurrent_requests(tokens),
                tokens_that_fit=capacity.tokens_that_fit(tokens),
            )
            for tokens in lengths
        ],
    )


def _settings(
    request: PlanRequest, checkpoint: Checkpoint, server: ServerPlan, dtype: str, longest: int
) -> PlanSettings:
    resolved = server.resolved
    return PlanSettings(
        model=request.model,
        pattern=server.pattern_name,
        mask_hash=resolved.selection.mask_hash,
        sparsity=resolved.selection.sparsity,
        cut=resolved.cut,
        cut_value=resolved.cut_value,
        sink_size=resolved.sink_size,
        recent_size=resolved.recent_size,
        sliding_layers=sum(window is not None for window in server.windows),
        sliding_window=max(filter(None, server.windows), default=None),
        num_layers=checkpoint.facts.num_layers,
        num_kv_heads=checkpoint.facts.num_kv_heads,
        head_size=checkpoint.facts.head_size,
        dtype=dtype,
        kv_cache_dtype=request.kv_cache_dtype,
        skipped_layers=sorted(server.skipped_layers) if request.kv_cache_dtype in FORMATS else [],
        streaming_cache_dtype=resolved.streaming_cache_dtype,
        block_size=request.block_size,
        num_speculative_tokens=request.num_speculative_tokens,
        draft_model=request.draft_model,
        draft_kv_cache_dtype=request.draft_kv_cache_dtype,
        max_model_len=longest,
        tensor_parallel_size=request.tensor_parallel_size,
        pipeline_parallel_size=request.pipeline_parallel_size,
        balance=resolved.balance,
        kv_cache_bytes=request.kv_cache_bytes,
    )


def _ratio(duo: float, full: float) -> float | None:
    """``duo / full``; None where full attention has no block to hold anything."""
    return duo / full if full else None


def _notes(
    request: PlanRequest, checkpoint: Checkpoint, dtype: str, duo: MemoryPlan, longest: int
) -> Iterator[str]:
    own_dtype = checkpoint.facts.own_cache.dtype
    if own_dtype != "auto":
        yield f"the checkpoint asks for a KV cache in {own_dtype}, which --kv-cache-dtype auto gives it"
    for flag, cache in (
        ("--kv-cache-dtype", request.kv_cache_dtype),
        ("--draft-kv-cache-dtype", request.draft_kv_cache_dtype or "auto"),
    ):
        if reason := cache_dtype_refusal(cache, dtype):
            refused = reason.replace("--kv-cache-dtype", flag, 1)
            yield f"this release's server refuses {refused}"
    if not checkpoint.is_known:
        yield (
            f"model type {checkpoint.model_type!r}: config.json was read by the usual names of its "
            "keys; what vLLM makes of this type was not compared"
        )
    if duo.concurrent_requests < 1:
        yield (
            f"the pool does not hold one request of {longest} tokens, so the server would not start: "
            f"the longest that fits has {duo.longest_request_tokens or 0} tokens"
        )


def _window_notes(server: ServerPlan) -> Iterator[str]:
    if not server.windows:
        return
    if slides_throughout(server.windows):
        yield "no head is left for a pattern to choose: duo holds what the model itself keeps"
    yield (
        f"{describe(server.windows)}: their heads stream with that window and no sink, and full "
        "attention stands for stock vLLM keeping no more than the window there"
    )
