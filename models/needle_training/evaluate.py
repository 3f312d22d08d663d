"""Accuracy of the needle model on fresh prompts, by plain masks and greedy tokens."""

import logging
import random
from collections.abc import Callable

import torch

from models.needle_training import data
from models.needle_training.gates import select_streaming
from models.needle_training.model import Needle, visible
from vllm_duo.evaluate import passkey

logger = logging.getLogger(__name__)

SINK_SIZE, RECENT_SIZE = 16, 64
LONGEST_FAILING = 2048  # modes that must fail are not measured beyond: it takes long, tells nothing


def modes(values: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Which KV heads stay full (gates of 0 or 1; None: all) under each mode that is measured."""
    half = (~select_streaming(values, 0.5)).float()
    top_quarter = select_streaming(1.0 - values.clamp(0.0, 1.0), 0.25)
    return {
        "full": None,
        "half streaming": half,
        "all streaming": torch.zeros_like(half),
        "top quarter streaming": (~top_quarter).float(),
    }


@torch.no_grad()
def accuracy(
    model: Needle,
    encode: data.Encoder,
    gates: torch.Tensor | None,
    *,
    length: int,
    prompts: int,
    seed: int,
    hidden_key: bool,
) -> float:
    """Share of prompts of `length` tokens that greedy decoding answers, end of sequence included.

    With the right answer appended, the most likely token is right at every place of it exactly when
    greedy decoding yields it: one pass a prompt does.

    Args:
        model: the trained network.
        encode: its tokenizer.
        gates: [layers, Hkv] of 0 (streaming) and 1 (full), or None.
        length: tokens of a prompt.
        prompts: how many prompts.
        seed: of the prompts.
        hidden_key: take only prompts whose key a streaming head no longer sees.
    """
    rng = random.Random(f"{seed} {length}")
    streaming = visible(length + 16, SINK_SIZE, RECENT_SIZE)
    right = 0
    for _ in range(prompts):
        prompt = _prompt(length, rng, encode.count, hidden_key)
        answer = [*encode(f" {prompt.answer}."), encode.eos]
        ids = torch.tensor([[encode.bos, *encode(prompt.text), *answer]])
        size = ids.shape[1]
        hidden = model(ids, gates=gates, streaming=streaming[:size, :size])
        predicted = model.logits(hidden[0, -len(answer) - 1 : -1]).argmax(-1)
        right += predicted.tolist() == answer
    return right / prompts


def table(
    model: Needle,
    encode: data.Encoder,
    values: torch.Tensor,
    *,
    lengths: tuple[int, ...],
    prompts: int,
    seed: int,
) -> dict[str, dict[int, float]]:
    """Accuracy per mode and length; where heads must fail, of prompts whose key they do not see."""
    result: dict[str, dict[int, float]] = {}
    for mode, gates in modes(values).items():
        failing = mode in ("all streaming", "top quarter streaming")
        result[mode] = {}
        for length in lengths:
            if failing and length > LONGEST_FAILING:
                continue
            result[mode][length] = accuracy(
                model, encode, gates, length=length, prompts=prompts, seed=seed, hidden_key=failing
            )
            logger.info("%s, %d tokens: %.3f", mode, length, result[mode][length])
    return result


def _prompt(
    length: int, rng: random.Random, count: Callable[[str], int], hidden_key: bool
) -> passkey.PasskeyPrompt:
    while True:
        prompt = passkey.make_prompt(length, rng=rng, count_tokens=count)
        if not hidden_key or not passkey.key_visible(
            prompt, sink_size=SINK_SIZE, recent_size=RECENT_SIZE
        ):
            return prompt
