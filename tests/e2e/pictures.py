"""Prompts with pictures: how vLLM is asked, and the oracle's answer to the same."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText

from tests.e2e.engine import Answer, answer_of
from tests.models.vision_models import FAMILIES, IMAGE, TOKENS_OF_PICTURE, WORDS, picture
from tests.oracle import Oracle, assert_right

SINK, RECENT, BLOCK = 20, 75, 16
LIMIT = 3
"""Pictures of a prompt."""


@dataclass(frozen=True)
class Prompt:
    """Words and, as ``Picture``, pictures in their order."""

    parts: tuple

    @property
    def pictures(self) -> list:
        return [picture(part.seed) for part in self.parts if isinstance(part, Picture)]

    def token_ids(self, family: str) -> list[int]:
        """As the API takes them: one token for each picture."""
        before, after = FAMILIES[family].around
        image = [*before, IMAGE, *after]
        ids: list[int] = []
        for part in self.parts:
            ids += image if isinstance(part, Picture) else part
        return ids


@dataclass(frozen=True)
class Picture:
    """``vision_models.picture`` of this seed."""

    seed: int


def prompt(*parts) -> Prompt:
    return Prompt(parts)


def words(number, seed):
    rng = random.Random(seed)
    return [rng.choice(WORDS) for _ in range(number)]


def prompts():
    """Without pictures, with one at either end or in the middle, with two of them and some alike."""
    first, second = Picture(1), Picture(2)
    return [
        prompt(words(19, 1)),
        prompt(words(300, 2)),
        prompt(words(30, 3), first, words(40, 4)),
        prompt(first, words(5, 5)),
        prompt(words(130, 6), second),
        prompt(words(40, 7), first, words(90, 8), second, words(200, 9)),
        prompt(words(40, 7), second, words(90, 8), first, words(200, 9)),
    ]


def limits_of(family: str) -> dict[str, int]:
    """What ``limit_mm_per_prompt`` takes; video needs torchvision."""
    return {"image": LIMIT} | ({"video": 0} if "qwen" in family else {})


@dataclass(frozen=True)
class Asked:
    """An answer, the prompt's tokens as vLLM expanded them, and how many of these were cached."""

    prompt: Prompt
    token_ids: list[int]
    answer: Answer
    cached: int


def request_of(family: str, asked: Prompt, embeddings=None) -> dict:
    """As vLLM's ``generate`` takes it; with embeddings in place of the pictures, if they are given."""
    request: dict = {"prompt_token_ids": asked.token_ids(family)}
    if asked.pictures:
        images = asked.pictures if embeddings is None else embeddings
        request["multi_modal_data"] = {"image": images}
    return request


def ask(running, family: str, prompts, max_tokens: int, embeddings=None) -> list[Asked]:
    """Greedy answers of all prompts, sent together; ``embeddings`` are those of every prompt."""
    outputs = running.llm.generate(
        [request_of(family, each, embeddings) for each in prompts],
        running.sampling(max_tokens),
        use_tqdm=False,
    )
    return [
        Asked(each, output.prompt_token_ids, answer_of(output), output.num_cached_tokens)
        for each, output in zip(prompts, outputs, strict=True)
    ]


def branches_of(ask_one: Callable[[Prompt], Asked], family: str) -> list[Asked]:
    """Prompts that part at a picture or behind one share what lies before that, and nothing more.

    Of an engine with blocks of ``BLOCK`` tokens that has seen none of these words.
    """
    head, tail = words(100, 20), words(50, 21)
    end = 100 + TOKENS_OF_PICTURE[family] + ("qwen" in family)
    by_picture = [prompt(head, Picture(seed), tail) for seed in (11, 12, 13, 11)]
    behind = [prompt(head, Picture(11), words(50, seed)) for seed in (22, 23)]
    asked = [ask_one(each) for each in by_picture + behind]
    hits = [each.cached for each in asked]
    whole = (len(asked[0].token_ids) - 1) // BLOCK * BLOCK
    # The second prompt finds where it parts from the first and stores a snapshot there for the third.
    assert hits[:4] == [0, 0, 96, whole], hits
    # Where the next two part lies within the picture, down to a whole block.
    assert hits[4:] == [96, end // BLOCK * BLOCK], hits
    assert 100 < hits[5] < end
    return asked


def assert_oracles(oracle: PictureOracle, asked: list[Asked], max_tokens: int) -> None:
    """Every answer is the oracle's."""
    for each in asked:
        assert_right(oracle.of(each.prompt), [each.token_ids], [each.answer], max_tokens)


@functools.lru_cache(maxsize=2)
def _load(model: str):
    loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    loaded.set_attn_implementation({"text_config": "duo_rule", "vision_config": "eager"})
    return loaded.eval()


class PictureOracle(Oracle):
    """The oracle of a multimodal model: transformers' own image tower, the rule in its decoder."""

    load = staticmethod(_load)

    def __init__(self, model: Path, *args, **kwargs) -> None:
        super().__init__(model, *args, **kwargs)
        self.processor = FAMILIES[model.name].images()
        self.kinds = "qwen" in json.loads((model / "config.json").read_text())["model_type"]
        self.inputs: dict = {}

    @property
    def layers(self):
        return self.model.model.language_model.layers

    def of(self, asked: Prompt) -> PictureOracle:
        """The same, looking at the prompt's pictures from now on."""
        self.inputs = {}
        if asked.pictures:
            self.inputs = dict(self.processor(asked.pictures, return_tensors="pt"))
        return self

    @torch.inference_mode()
    def embeddings(self, asked: Prompt) -> torch.Tensor:
        """[pictures, tokens, hidden] what the decoder is to see of the prompt's pictures."""
        features = self.of(asked).model.model.get_image_features(**self.inputs)
        return torch.stack(list(features.pooler_output))

    def logits(self, token_ids):
        ids = torch.tensor([list(token_ids)])
        inputs = dict(self.inputs)
        if inputs and self.kinds:
            inputs["mm_token_type_ids"] = (ids == IMAGE).int()  # 1: an image
        return self.model(ids, use_cache=False, **inputs).logits[0]
