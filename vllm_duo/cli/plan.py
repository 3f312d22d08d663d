"""``vllm-duo plan``: what a server with duo would hold, beside stock vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vllm_duo.planning.plan import PlanRequest

app = typer.Typer(add_completion=False, rich_markup_mode=None)

GIB = 2**30


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Folder with config.json, or Hugging Face id.")],
    kv_cache_gib: Annotated[float, typer.Option(help="KV pool of one rank, in GiB.")],
    pattern: Annotated[
        str | None,
        typer.Option(help="Folder or shipped name; default: looked up as the server does."),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the KV heads that stream; default 0.5.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Instead: heads at or above it are retrieval heads.")
    ] = None,
    sink_size: Annotated[int | None, typer.Option(help="Tokens; default as in the server.")] = None,
    recent_size: Annotated[
        int | None, typer.Option(help="Tokens; default as in the server.")
    ] = None,
    max_model_len: Annotated[
        str | None, typer.Option(help="Tokens, or auto: what fits; default: the model's own.")
    ] = None,
    tp: Annotated[int, typer.Option("--tp", help="Tensor-parallel size.")] = 1,
    pp: Annotated[int, typer.Option("--pp", help="Pipeline-parallel size.")] = 1,
    balance: Annotated[
        bool, typer.Option("--balance", help="Stream the same share of the heads on every rank.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="As vLLM's.")] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option(help="As vLLM's.")] = "auto",
    kv_cache_dtype_skip_layers: Annotated[
        str | None, typer.Option(help="As vLLM's, with commas: 0,31,sliding_window.")
    ] = None,
    streaming_cache_dtype: Annotated[
        str | None,
        typer.Option(help="With a quantised cache, what streaming heads keep: same or model."),
    ] = None,
    block_size: Annotated[
        int, typer.Option(help="Tokens of a block; vLLM takes 128 on CPUs, 16 on most GPUs.")
    ] = 128,
    num_speculative_tokens: Annotated[
        int, typer.Option(help="Drafts of a step, as in vLLM's --speculative-config.")
    ] = 0,
    draft_model: Annotated[
        str | None, typer.Option(help="The draft model or EAGLE head, if one drafts: folder or id.")
    ] = None,
    draft_kv_cache_dtype: Annotated[
        str | None, typer.Option(help="Its own KV cache, as in --speculative-config.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Request lengths to list: 4096,32768; default: doubles.")
    ] = None,
    language_model_only: Annotated[
        bool,
        typer.Option(
            "--language-model-only",
            help="As vLLM's: a multimodal model serves its text alone.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (docs/plan.md).")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw requests over length to this .png, .svg or .pdf.")
    ] = None,
) -> None:
    """Work out the KV memory of a server with duo from config.json, beside stock vLLM.

    Exact: these are the server's own figures. All bytes are of one rank.
    """
    from vllm_duo.planning.plan import PlanRequest, plan_memory

    if not 0 < kv_cache_gib < float("inf"):
        raise ValueError(f"--kv-cache-gib: expected more than 0, got {kv_cache_gib}: correct it")
    duo: dict[str, Any] = {
        "pattern": pattern,
        "sparsity": sparsity,
        "threshold": threshold,
        "sink_size": sink_size,
        "recent_size": recent_size,
        "streaming_cache_dtype": streaming_cache_dtype,
        "balance": balance or None,
    }
    request = PlanRequest(
        model=model,
        duo={key: value for key, value in duo.items() if value is not None},
        kv_cache_bytes=int(kv_cache_gib * GIB),
        max_model_len=_length("--max-model-len", max_model_len),
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        skip_layers=_parts(kv_cache_dtype_skip_layers),
        block_size=block_size,
        num_speculative_tokens=num_speculative_tokens,
        draft_model=draft_model,
        draft_kv_cache_dtype=draft_kv_cache_dtype,
        lengths=_lengths(lengths),
        language_model_only=language_model_only,
    )
    _answer(request, plan_memory, as_json, plot)


def _answer(request: PlanRequest, plan_memory: Any, as_json: bool, plot: Path | None) -> None:
    if plot is not None:
        from vllm_duo.figures import check_figure_file

        check_figure_file(plot)
    found = plan_memory(request)
    if plot is not None:
        from vllm_duo.planning.plot import draw

        draw(found, plot)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        from vllm_duo.cli.consoles import out
        from vllm_duo.planning.table import tables

        out.print(*tables(found), sep="\n")


def _length(flag: str, given: str | None) -> Any:
    if given is None or given == "auto":
        return given
    if not given.isascii() or not given.isdigit():
        raise ValueError(
            f"{flag}: expected a whole number of tokens or auto, got {given!r}: correct it"
        )
    return int(given)


def _parts(given: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in given.split(",")) if given else ()


def _lengths(given: str | None) -> tuple[int, ...]:
    parts = _parts(given)
    if any(not part.isdigit() for part in parts):
        raise ValueError(
            f"--lengths: expected numbers of tokens as in 4096,32768, got {given!r}: correct it"
        )
    return tuple(int(part) for part in parts)
