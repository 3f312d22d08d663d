"""Finds the retrieval heads: one gate a KV head (DuoAttention, arXiv:2410.10819, section 2.2)."""

import logging
import random
import time
from dataclasses import dataclass

import torch

from models.needle_training import data
from models.needle_training.model import Needle, visible
from vllm_duo.evaluate import passkey

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GateSettings:
    """How the gates are found."""

    seed: int = 0
    num_steps: int = 140
    batch_size: int = 4
    max_length: int = 512
    lr: float = 0.02
    reg_weight: float = 0.05
    initial_value: float = 1.0
    sink_size: int = 16
    recent_size: int = 64


def find_gates(
    model: Needle, encode: data.Encoder, settings: GateSettings
) -> tuple[torch.Tensor, float]:
    """Gates [layers, Hkv] in [0, 1] and the seconds that it took; the weights stay as they are.

    Loss: MSE of the last hidden states where the answer is predicted, between gated and full model,
    plus reg_weight * sum of the gates.
    """
    rng = random.Random(settings.seed)
    shape = model.shape
    gates = torch.full((shape.layers, shape.kv_heads), settings.initial_value, requires_grad=True)
    optimizer = torch.optim.AdamW([gates], lr=settings.lr, weight_decay=0.0)
    streaming = visible(settings.max_length, settings.sink_size, settings.recent_size)
    model.requires_grad_(False)
    started = time.monotonic()
    for step in range(settings.num_steps):
        ids, answers = _answered_prompts(settings, rng, encode)
        with torch.no_grad():
            wanted = model(ids)[answers]
        distance = (model(ids, gates=gates, streaming=streaming)[answers] - wanted).square().mean()
        loss = distance + settings.reg_weight * gates.abs().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            gates.clamp_(0.0, 1.0)
        if step % 20 == 0 or step == settings.num_steps - 1:
            logger.info(
                "gates step %d: distance %.4f sum %.2f", step, distance.item(), gates.detach().sum()
            )
    model.requires_grad_(True)
    return gates.detach(), time.monotonic() - started


def select_streaming(values: torch.Tensor, sparsity: float) -> torch.Tensor:
    """[layers, Hkv] bool: the floor(sparsity * n + 0.5) heads of lowest value.

    Among equal values the next one comes from the layer with most retrieval heads left, then the
    lower layer, then the lower head.
    """
    clipped = values.clamp(0.0, 1.0)
    streams = torch.zeros_like(clipped, dtype=torch.bool)
    layers, heads = clipped.shape
    for _ in range(int(sparsity * layers * heads + 0.5)):
        left = (~streams).sum(dim=1)
        candidates = [(i, h) for i in range(layers) for h in range(heads) if not streams[i, h]]
        layer, head = min(
            candidates, key=lambda c: (clipped[c].item(), -int(left[c[0]]), c[0], c[1])
        )
        streams[layer, head] = True
    return streams


def _answered_prompts(
    settings: GateSettings, rng: random.Random, encode: data.Encoder
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts with their answers: [B, T] ids; [B, T] bool: an answer token is predicted there."""
    ids = torch.zeros(settings.batch_size, settings.max_length, dtype=torch.long)
    answers = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(settings.batch_size):
        prompt = passkey.make_prompt(
            settings.max_length - 8, rng=rng, count_tokens=encode.count, digits=5
        )
        answer = [*encode(f" {prompt.answer}."), encode.eos]
        sequence = [encode.bos, *encode(prompt.text), *answer]
        ids[row, : len(sequence)] = torch.tensor(sequence)
        answers[row, prompt.tokens - 1 : prompt.tokens + len(answer) - 1] = True
    return ids, answers
