"""Medusa heads that are sometimes right: linear maps fitted to what a model answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

RIDGE = 1e-2
"""Added to the squares' diagonal: the hidden states of one text may lie in fewer dimensions."""


def make_heads(
    texts: Sequence[Sequence[int]],
    hidden: Sequence[torch.Tensor],
    vocabulary: int,
    number: int,
    folder: Path,
) -> Path:
    """Write heads that guess the tokens behind the next one; wrong where no linear map tells them.

    Args:
        texts: [n] tokens each, prompts with the model's answers.
        hidden: [n, hidden size] each, the model's last hidden state at every token.
        vocabulary: of the model.
        number: of heads, one for each token that is guessed.
        folder: to write into.

    Returns:
        The folder.
    """
    states = torch.cat([each[: -number - 1] for each in hidden])
    size = states.shape[1]
    squares = states.T @ states + RIDGE * torch.eye(size)
    weights = {}
    for head in range(number):
        # At position p the model itself gives the token of p + 1.
        target = [
            token for text in texts for token in text[2 + head : len(text) - number + 1 + head]
        ]
        answers = torch.nn.functional.one_hot(torch.tensor(target), vocabulary).float()
        weights[f"lm_heads.{head}.weight"] = torch.linalg.solve(squares, states.T @ answers).T
        # No more than that: the head's own layer adds nothing.
        weights[f"blocks.{head}.layers.0.weight"] = torch.zeros(size, size)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **{"architectures": ["MedusaModel"], "model_type": "medusa", "num_hidden_layers": 1},
        **{"num_heads": number, "hidden_size": size, "vocab_size": vocabulary},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: weight.contiguous() for name, weight in weights.items()},
        folder / "model.safetensors",
    )
    return folder
