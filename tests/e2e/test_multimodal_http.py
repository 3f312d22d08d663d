"""Pictures over HTTP: base64 data URLs in chat completions get the oracle's answers."""

from __future__ import annotations

import base64
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import openai
import pytest

from tests.e2e.engine import Answer, write_pattern
from tests.e2e.needle import SERVER_ENV, client_of
from tests.e2e.pictures import (
    BLOCK,
    LIMIT,
    RECENT,
    SINK,
    Asked,
    Picture,
    PictureOracle,
    assert_oracles,
    branches_of,
    limits_of,
    prompts,
)
from tests.e2e.test_exactness import mask_of
from tests.e2e.test_served_requests import assert_all_blocks_return
from tests.models.vision_models import FAMILIES, IMAGE, KV_HEADS, picture
from tests.vision import write_plugin
from vllm_duo.evaluate.server import ServerProcess

pytestmark = [pytest.mark.engine, pytest.mark.slow]

ANSWER = 24
NAME = "pictures"
MASK = mask_of("mixed", KV_HEADS)


def template_of(family):
    """A chat is its words and pictures in their order, and nothing else."""
    names = {token: name for name, token in FAMILIES[family].specials.items()}
    before, after = FAMILIES[family].around
    image = "".join(names[token] for token in (*before, IMAGE, *after))
    return (
        "{% for message in messages %}{% for part in message.content %}"
        f"{{{{ part.text if part.type == 'text' else '{image}' }}}} "
        "{% endfor %}{% endfor %}"
    )


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def server(family, vision_model, tmp_path_factory):
    """With the settings of the engines in ``test_multimodal.py``: chunks shorter than a picture."""
    folder = tmp_path_factory.mktemp(family)
    template = folder / "template.jinja"
    template.write_text(template_of(family))
    duo = {
        **{"pattern": str(write_pattern(folder / "pattern", MASK)), "threshold": 0.5},
        **{"sink_size": SINK, "recent_size": RECENT},
    }
    flags = [
        *("--attention-backend", "duo", "--additional-config", json.dumps({"duo": duo})),
        *("--served-model-name", NAME, "--dtype", "float32", "--enforce-eager"),
        *("--block-size", str(BLOCK), "--num-gpu-blocks-override", "6000"),
        *("--max-model-len", "2200", "--max-num-batched-tokens", "100", "--max-num-seqs", "32"),
        *("--limit-mm-per-prompt", json.dumps(limits_of(family))),
        *("--chat-template", str(template), "--chat-template-content-format", "openai"),
        "--enable-prompt-tokens-details",
    ]
    path = (write_plugin(folder / "plugin"), Path(__file__).parents[2])
    env = SERVER_ENV | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    with ServerProcess(vision_model(family), flags, log=folder / "log", env=env) as running:
        running.wait_until_ready()
        yield running


def url_of(seed):
    png = io.BytesIO()
    picture(seed).save(png, "PNG")
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"


def part_of(part):
    if isinstance(part, Picture):
        return {"type": "image_url", "image_url": {"url": url_of(part.seed)}}
    return {"type": "text", "text": " ".join(f"t{token}" for token in part)}


def ask(server, family, asked):
    """Greedy, through OpenAI's own client; the prompt that vLLM made of it must be the one meant."""
    answer = client_of(server).chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": [part_of(part) for part in asked.parts]}],
        max_tokens=ANSWER,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={
            **{"return_token_ids": True, "return_tokens_as_token_ids": True},
            "ignore_eos": True,
        },
    )
    ids, (choice,) = answer.prompt_token_ids, answer.choices
    once = [
        ids[0],
        *(token for before, token in pairwise(ids) if (before, token) != (IMAGE, IMAGE)),
    ]
    assert once == asked.token_ids(family)
    rows = tuple(
        {int(each.token.removeprefix("token_id:")): each.logprob for each in row.top_logprobs}
        for row in choice.logprobs.content
    )
    details = answer.usage.prompt_tokens_details
    cached = details.cached_tokens if details else 0
    return Asked(asked, ids, Answer(tuple(choice.token_ids), rows), cached)


@pytest.mark.feature("images over HTTP", "prefix caching", "chat completions API")
def test_answers_are_the_oracles(server, family, vision_model):
    """One by one, as ``branches_of`` has it: another picture is no hit and the same one is; then many
    at once, twice."""
    branches = branches_of(lambda each: ask(server, family, each), family)
    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(lambda each: ask(server, family, each), prompts() * 2))
    oracle = PictureOracle(vision_model(family), MASK, SINK, RECENT)
    assert_oracles(oracle, branches + many, ANSWER)
    assert server.metrics()["vllm_duo:streaming_prefix_hits_total{engine=0}"] >= 4


def test_pictures_that_cannot_be_served_get_vllms_own_answer(server):
    client = client_of(server)
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    for parts, message in (
        ([broken], "image"),
        ([part_of(Picture(seed)) for seed in range(LIMIT + 1)], f"At most {LIMIT} image"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.chat.completions.create(
                model=NAME, messages=[{"role": "user", "content": parts}], max_tokens=2
            )
    assert_all_blocks_return(server, client, NAME)
