"""What of a model decides its KV cache, and whether duo can serve it.

The server fills ``ModelFacts`` from vLLM's config (``support.py``), the command line from config.json
alone (``planning/checkpoint.py``); both ask ``model_refusals``. No vLLM, no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from vllm_duo.checkpoint_cache import NO_CACHE, CheckpointCache
from vllm_duo.kv_cache.ranks import split_problem
from vllm_duo.windows import UNKNOWN, Windows, describe

HEAD_SIZES = (16, 32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Head sizes that the operators are tested with or that stock vLLM's CPU kernels also serve."""

MULTIMODAL = ("llava", "mistral3", "qwen2_vl", "qwen2_5_vl")
"""Model types whose images and text were served and held against an oracle (docs/multimodal.md)."""

MULTIMODAL_WITH_LAYERS_THAT_DRAFT = ("llava", "mistral3", "qwen2_5_vl")
"""Those that a draft model or an EAGLE head drafts for. vLLM 0.32 loads no such layers for Qwen2-VL."""

TEXT_ALONE = "--language-model-only serves its text alone"


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """One model.

    Attributes:
        name: as the user gave it: a folder or a Hugging Face id.
        num_layers: layers with attention.
        num_kv_heads: of one layer, before any tensor-parallel split.
        head_size: ``D``.
        runner_type: vLLM's word, "generate" for text generation.
        uses_mla: multi-head latent attention.
        is_encoder_decoder: the decoder attends to an encoder.
        has_other_layers: Mamba, linear attention or none at all in some layers.
        multimodal: config.json's model type, of a model that takes more than text as it is served;
            None: text alone.
        sees_both_ways: the tokens of an image attend to one another, later ones too (vLLM's word is
            "mm_prefix").
        windows: the model's own sliding windows, by layer; None: it has some, which are not known.
        attention_chunk_size: of chunked local attention, in tokens.
        soft_caps_logits: attention logits are soft-capped.
        uses_alibi: position biases.
        is_not_causal: another mask than the causal one.
        has_noops: some layers have no attention.
        own_cache: the KV cache that the checkpoint asks for.
        shares_caches: some layers read another layer's KV cache.
    """

    name: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    runner_type: str = "generate"
    uses_mla: bool = False
    is_encoder_decoder: bool = False
    has_other_layers: bool = False
    multimodal: str | None = None
    sees_both_ways: bool = False
    windows: Windows | None = ()
    attention_chunk_size: int | None = None
    soft_caps_logits: bool = False
    uses_alibi: bool = False
    is_not_causal: bool = False
    has_noops: bool = False
    own_cache: CheckpointCache = NO_CACHE
    shares_caches: bool = False


def model_refusals(model: ModelFacts) -> Iterator[str]:
    """Every reason why duo cannot serve this model; none where it can."""
    if model.runner_type != "generate":
        yield f"the task {model.runner_type!r}: only text generation keeps a KV cache"
    if model.uses_mla:
        yield "multi-head latent attention (MLA): its cache has no KV heads to split"
    if model.is_encoder_decoder:
        yield (
            "cross-attention (an encoder-decoder model): duo has caches for what a request's own "
            "tokens attend to alone"
        )
    if model.has_other_layers:
        yield (
            "layers without attention (Mamba, linear attention and their like): their states would "
            "need a second layout of caches beside duo's"
        )
    if model.multimodal is not None and not model.is_encoder_decoder:
        yield from _multimodal_refusals(model.multimodal, model.sees_both_ways)
    if model.windows is None:
        yield UNKNOWN
    if model.attention_chunk_size:
        yield (
            f"chunked local attention ({model.attention_chunk_size} tokens): duo's kernels attend to "
            "all tokens, or to a sink and the recent ones"
        )
    if model.soft_caps_logits:
        yield "soft-capped attention logits: duo's kernels do not cap them"
    if model.uses_alibi:
        yield "ALiBi position biases: duo's kernels add none"
    if model.is_not_causal:
        yield (
            "attention that is not causal over the whole request: streaming heads drop what a later "
            "token could still see"
        )
    if model.has_noops:
        yield (
            "layers without attention among the model's layers: a head pattern has a row of heads for "
            "each of them"
        )
    if problem := model.own_cache.problem:
        yield f"the checkpoint's own KV cache quantisation: {problem}"
    if model.head_size not in HEAD_SIZES:
        sizes = ", ".join(map(str, HEAD_SIZES))
        yield f"the head size {model.head_size}: supported are {sizes}"
    if model.shares_caches:
        yield (
            "layers that share another layer's KV cache: with duo each layer has caches of its own"
        )


def _multimodal_refusals(model_type: str, sees_both_ways: bool) -> Iterator[str]:
    if sees_both_ways:
        yield (
            f"images whose tokens attend to later ones (model type {model_type}): duo's attention is "
            f"causal; {TEXT_ALONE}"
        )
    elif model_type not in MULTIMODAL:
        yield (
            f"multimodal input (model type {model_type}): not tested, expected one of "
            f"{', '.join(MULTIMODAL)}; {TEXT_ALONE}"
        )


def draft_refusals(model: ModelFacts, ranks: int) -> Iterator[str]:
    """Every reason why this model cannot draft for one that duo serves; none where it can.

    Args:
        model: its ``runner_type`` is not read: vLLM calls a drafting model's task "draft".
        ranks: tensor-parallel size.
    """
    if problem := split_problem(model.num_kv_heads, ranks):
        yield f"what drafts: {problem}"
    for reason in model_refusals(replace(model, runner_type="generate", multimodal=None)):
        yield f"what drafts: {reason}"
    if model.multimodal is not None:
        yield f"what drafts: a model that takes images ({model.multimodal}): use a text model"
    if model.own_cache.dtype != "auto":
        yield (
            f"what drafts: the checkpoint's own KV cache quantisation ({model.own_cache.dtype}): its "
            "cache has the model's numbers"
        )
    if model.windows:
        yield (
            f"what drafts: the model's own sliding window ({describe(model.windows)}): the heads "
            "of a draft model or EAGLE head keep every token"
        )
