"""A plan as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from vllm_duo.kv_cache.formats import FORMATS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vllm_duo.planning.schema import MemoryPlan, Plan

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def tables(plan: Plan) -> list[RenderableType]:
    """The settings, the two ways of keeping the cache, the lengths, and the notes."""
    return [
        Text(_heading(plan)),
        _comparison(plan),
        _lengths(plan),
        *(Text(f"Note: {note}", style="yellow") for note in plan.notes),
    ]


def _heading(plan: Plan) -> str:
    found = plan.settings
    drafts = f" and {found.num_speculative_tokens} slots for drafts"
    if found.draft_model is not None:
        drafts += f" of {found.draft_model}"
    if found.draft_kv_cache_dtype is not None:
        drafts += f" (KV cache {found.draft_kv_cache_dtype})"
    keeps_own = found.streaming_cache_dtype == "model" and found.kv_cache_dtype in FORMATS
    apart = f", streaming heads {found.dtype}" * keeps_own
    skipped = len(found.skipped_layers)
    apart += f", {skipped} of {found.num_layers} layers {found.dtype}" * bool(skipped)
    number = found.tensor_parallel_size * found.pipeline_parallel_size
    ranks = f", each of {number} ranks" * (number > 1)
    return (
        f"{found.model}: {found.num_layers} layers x {found.num_kv_heads} KV heads of size "
        f"{found.head_size}, {found.dtype}, KV cache {found.kv_cache_dtype}{apart}\n"
        f"pattern {found.pattern}, {found.cut} {found.cut_value:g}: {found.sparsity:.1%} of the heads "
        f"stream, mask {found.mask_hash}, sink {found.sink_size} + recent {found.recent_size} tokens"
        f"{drafts * bool(found.num_speculative_tokens)}\n"
        f"KV pool {size(found.kv_cache_bytes)}{ranks}"
    )


def _comparison(plan: Plan) -> Table:
    table = Table("", "duo", "full attention", "factor")
    for column in table.columns[1:]:
        column.justify = "right"
    tokens = f"{plan.settings.max_model_len:,} tokens"
    duo, full = plan, plan.full
    table.add_row(
        f"requests of {tokens} at once",
        f"{duo.concurrent_requests:,.2f}",
        f"{full.concurrent_requests:,.2f}",
        _times(duo.concurrent_requests, full.concurrent_requests),
    )
    table.add_row(
        "tokens that fit",
        f"{duo.tokens_that_fit:,}",
        f"{full.tokens_that_fit:,}",
        _times(duo.tokens_that_fit, full.tokens_that_fit),
    )
    table.add_row("longest request", *map(_longest, (duo, full)), "")
    table.add_row(
        "bytes of each token",
        size(duo.bytes_per_token),
        size(full.bytes_per_token),
        _times(full.bytes_per_token, duo.bytes_per_token),
    )
    table.add_row(
        "constant bytes of a request",
        size(duo.constant_bytes_per_request),
        size(full.constant_bytes_per_request),
        "",
    )
    table.add_row(f"waste at {tokens}", f"{duo.waste:.2%}", f"{full.waste:.2%}", "")
    streaming = f" / {plan.streaming_block_size} streaming" * bool(plan.num_bins)
    table.add_row(
        "tokens of a block", f"{plan.settings.block_size}{streaming}", str(plan.settings.block_size)
    )
    if plan.settings.kv_cache_dtype in FORMATS and plan.times_unquantised_full_attention:
        table.add_row(
            f"requests, against a {plan.settings.dtype} cache",
            "",
            "",
            f"{plan.times_unquantised_full_attention:.2f} x",
        )
    table.add_row("bytes of a block", size(duo.block_bytes), size(full.block_bytes))
    table.add_row("blocks of the pool", f"{duo.num_blocks:,}", f"{full.num_blocks:,}")
    return table


def _lengths(plan: Plan) -> Table:
    table = Table("request", "duo holds", "full holds", "waste", "duo fits", "full fits", "factor")
    for column in table.columns:
        column.justify = "right"
    for duo, full in zip(plan.by_length, plan.full.by_length, strict=True):
        table.add_row(
            f"{duo.tokens:,}",
            size(duo.held_bytes),
            size(full.held_bytes),
            f"{duo.waste:.2%}",
            f"{duo.concurrent_requests:,.2f}",
            f"{full.concurrent_requests:,.2f}",
            _times(duo.concurrent_requests, full.concurrent_requests),
        )
    return table


def _longest(memory: MemoryPlan) -> str:
    tokens = memory.longest_request_tokens
    return "any length" if tokens is None else f"{tokens:,} tokens"


def _times(duo: float, full: float) -> str:
    return f"{duo / full:.2f} x" if full else "-"


def size(num_bytes: float) -> str:
    """Bytes in the largest unit that leaves at least one of it.

    Worked example: 1,536 is 1.50 KiB.
    """
    for unit in UNITS[:-1]:
        if num_bytes < 1024:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.2f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.2f} {UNITS[-1]}"
