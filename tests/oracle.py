"""The oracle: an eager transformers forward in float32 with the rule as a mask per KV head.

Written without the package's operators but those that say what a quantised cache keeps.
Source of the rule: docs/design.md, section "The rule".
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from vllm_duo.ops.quantise import dequantise, quantise


def _rule(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention of one layer: query [1, Hq, n, D], key and value [1, Hkv, n, D], no cache."""
    retrieval = module.duo_retrieval  # [Hkv] bool
    group = query.shape[1] // key.shape[1]
    n = query.shape[2]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    causal = j <= i
    window = causal & ((j < module.duo_sink) | (j > i - module.duo_recent))
    mask = torch.where(torch.as_tensor(retrieval)[:, None, None], causal, window)  # [Hkv, n, n]
    mask = mask.repeat_interleave(group, 0)
    if module.duo_form is not None:
        own = torch.as_tensor(retrieval)[:, None, None] | module.duo_streaming_quantised
        form, scales = module.duo_form, module.duo_scales
        kept = quantise(key.transpose(1, 2), value.transpose(1, 2), form, *scales)
        kept = (t.transpose(1, 2).float() for t in dequantise(kept, form, *scales))
        key, value = (torch.where(own, *both) for both in zip(kept, (key, value), strict=True))
    key = key[0].repeat_interleave(group, 0)
    value = value[0].repeat_interleave(group, 0)
    logits = (query[0] @ key.mT) * scaling
    logits = logits.masked_fill(~mask, -torch.inf)
    # Learned sinks: one more logit of each query head, without a value.
    sinks = getattr(module, "sinks", None)
    if sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(-1, n, 1)], -1)
    weights = logits.softmax(-1)[..., :n]
    return (weights @ value).transpose(0, 1)[None].contiguous(), None


AttentionInterface.register("duo_rule", _rule)


@functools.lru_cache(maxsize=4)
def _load(model: str):
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded.set_attn_implementation("duo_rule")
    # Where vLLM serves transformers' own class it wraps it; this tells its wrapper to stay out.
    loaded.model.do_not_compile = True
    return loaded.eval()


class Oracle:
    """Log-probabilities of a model under the rule.

    Args:
        model: checkpoint folder.
        retrieval: [layers, Hkv] bool.
        sink_size: tokens.
        recent_size: tokens.
        form: of a quantised cache, whose numbers it computes with; None: keys and values as they are.
        streaming_quantised: False: of streaming heads it takes keys and values as they are.
        scales: per layer one of its keys and one of its values, where the format has none of its own;
            None: 1.
        skipped: layers of which it takes keys and values as they are.
        windows: per layer a sliding window of the model's own, in tokens, or None; its row of
            ``retrieval`` is not read. Empty: no layer has one.
    """

    def __init__(
        self,
        model: Path | str,
        retrieval,
        sink_size: int,
        recent_size: int,
        form=None,
        windows=(),
        streaming_quantised=True,
        scales=None,
        skipped=(),
    ) -> None:
        self.model = self.load(str(model))
        self.retrieval = np.asarray(retrieval, dtype=bool)
        self.sizes = (sink_size, recent_size)
        self.form = form
        self.streaming_quantised = streaming_quantised
        self.scales = scales or [(1.0, 1.0)] * len(self.retrieval)
        self.skipped = skipped
        self.windows = windows or [None] * len(self.retrieval)

    load = staticmethod(_load)

    @property
    def layers(self):
        """The decoder's, in order."""
        return self.model.model.layers

    def logits(self, token_ids) -> torch.Tensor:
        """[n, vocabulary] after each of the n tokens."""
        return self.model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]

    @torch.inference_mode()
    def logprobs(self, token_ids) -> torch.Tensor:
        """[n, vocabulary] log-probabilities after each of the n tokens."""
        rows = zip(self.layers, self.retrieval, self.windows, strict=True)
        for index, (layer, retrieval, window) in enumerate(rows):
            sizes = self.sizes if window is None else (0, window)
            layer.self_attn.duo_retrieval = (
                retrieval if window is None else np.zeros_like(retrieval)
            )
            layer.self_attn.duo_form = None if index in self.skipped else self.form
            layer.self_attn.duo_scales = self.scales[index]
            layer.self_attn.duo_streaming_quantised = self.streaming_quantised
            layer.self_attn.duo_sink, layer.self_attn.duo_recent = sizes
        return self.logits(token_ids).float().log_softmax(-1)


def mismatches(oracle: Oracle, prompt, served, served_logprobs, *, tie=1e-3, tolerance=1e-2):
    """What a served answer gets wrong, the oracle forced along the served tokens.

    Args:
        oracle: the oracle.
        prompt: prompt token ids.
        served: generated token ids.
        served_logprobs: per generated token, its top log-probabilities by token id.
        tie: how far below the oracle's best log-probability a token may lie: float32 sums in another
            order move log-probabilities by some 1e-5, so a token within 1e-3 is a tie.
        tolerance: bound on the difference of a reported log-probability; float32 in both.

    Returns:
        Sentences, one a mismatch; empty for a right answer.
    """
    wrong = []
    reference = oracle.logprobs([*prompt, *served])[len(prompt) - 1 : -1]
    for step, (token, reported, row) in enumerate(
        zip(served, served_logprobs, reference, strict=True)
    ):
        best = float(row.max())
        if float(row[token]) < best - tie:
            wrong.append(f"step {step}: token {token} at {float(row[token]):.4f}, best {best:.4f}")
        for candidate, logprob in reported.items():
            if abs(logprob - float(row[candidate])) > tolerance:
                wrong.append(
                    f"step {step}: token {candidate} served at {logprob:.4f}, "
                    f"oracle {float(row[candidate]):.4f}"
                )
    return wrong


def assert_right(oracle: Oracle, prompts, answers, num_tokens: int | None = None) -> None:
    """Every answer is the oracle's own, and ``num_tokens`` long where that is told."""
    for prompt, answer in zip(prompts, answers, strict=True):
        if num_tokens is not None:
            assert len(answer.tokens) == num_tokens, f"{len(answer.tokens)} tokens"
        wrong = mismatches(oracle, prompt, answer.tokens, answer.logprobs)
        assert not wrong, "\n".join(wrong)
