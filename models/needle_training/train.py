"""The training loop: lengths that grow as the digits come right, then mixed lengths."""

import logging
import math
import random
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.needle_training import data
from models.needle_training.model import Needle

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainSettings:
    """What the training does; the defaults made the published model."""

    seed: int = 0
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    step_tokens: int = 2048
    stage_lengths: tuple[int, ...] = (64, 128, 256, 512)
    first_stage_steps: int = 1200
    stage_steps: int = 120
    stage_accuracy: float = 0.97
    mixed_steps: int = 350
    mixed_lengths: tuple[int, int] = (64, 2048)
    position_span: int = 4096
    repeats: float = 0.3
    text_weight: float = 0.2


def loss_and_accuracy(
    model: Needle, batch: data.Batch, text_weight: float
) -> tuple[torch.Tensor, float]:
    """Loss: text_weight * CE(text) + CE(copied tokens) + CE(answers); share of answer tokens right.

    The share is NaN for a batch without answers.
    """
    targets, kinds = batch.ids[:, 1:], batch.kinds[:, 1:]
    chosen = kinds != data.PAD_KIND
    hidden = model(batch.ids, batch.positions)[:, :-1][chosen]
    targets, kinds = targets[chosen], kinds[chosen]
    logits = model.logits(hidden)
    losses = F.cross_entropy(logits, targets, reduction="none")
    weights = {data.TEXT_KIND: text_weight, data.COPY_KIND: 1.0, data.ANSWER_KIND: 1.0}
    total = losses.sum() * 0.0
    for kind, weight in weights.items():
        if (kinds == kind).any():
            total = total + weight * losses[kinds == kind].mean()
    answers = kinds == data.ANSWER_KIND
    right = (logits[answers].argmax(-1) == targets[answers]).float().mean().item()
    return total, right


def train(model: Needle, encode: data.Encoder, settings: TrainSettings) -> float:
    """Train `model` in place and return the seconds that it took."""
    rng = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    started, step = time.monotonic(), 0

    def run(length: int, scale: float) -> float:
        nonlocal step
        warmup = min(1.0, (step + 1) / settings.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warmup * scale
        batch = data.make_batch(
            length,
            max(1, settings.step_tokens // length),
            rng,
            encode,
            span=settings.position_span,
            repeats=settings.repeats,
        )
        loss, accuracy = loss_and_accuracy(model, batch, settings.text_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            logger.info(
                "step %d length %d loss %.3f answer tokens %.3f after %.0f s",
                step, length, loss.item(), accuracy, time.monotonic() - started,
            )  # fmt: skip
        step += 1
        return accuracy

    for stage, length in enumerate(settings.stage_lengths):
        smooth = 0.0
        for _ in range(settings.stage_steps if stage else settings.first_stage_steps):
            accuracy = run(length, 1.0)
            if not math.isnan(accuracy):  # NaN: a batch without answers
                smooth = 0.8 * smooth + 0.2 * accuracy
            if smooth >= settings.stage_accuracy:
                break
        logger.info("length %d done: answer tokens %.3f at step %d", length, smooth, step)
    low, high = (math.log(length) for length in settings.mixed_lengths)
    for mixed in range(settings.mixed_steps):
        scale = 1.0 - 0.98 * (mixed + 1) / settings.mixed_steps
        run(round(math.exp(rng.uniform(low, high))), scale)
    return time.monotonic() - started
