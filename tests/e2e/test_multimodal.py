"""Models that take images: the decoder streams, the image tower is left alone.

Every answer is held against transformers' own model of the same weights, with the rule in its decoder.
"""

from __future__ import annotations

import random

import pytest

from tests.e2e.engine import engine, write_pattern
from tests.e2e.pictures import Picture, PictureOracle, ask, assert_oracles, prompt
from tests.e2e.test_exactness import mask_of
from tests.models.vision_models import KV_HEADS, TOKENS_OF_PICTURE, WORDS
from tests.vision import vision  # noqa: F401 - a fixture

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("vision")]

SINK, RECENT, BLOCK = 20, 75, 16
ANSWER = 24
SHOWN = {
    "llava": "LLaVA",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "mistral3": "Mistral 3",
}
QUICK = ("llava", "qwen2_vl")  # a plain decoder behind a nested config, and M-RoPE


def by_family(quick):
    """Every family, by default those that are quick."""
    return pytest.mark.parametrize(
        "family",
        [
            pytest.param(
                name,
                marks=[pytest.mark.feature(shown), *([] if name in quick else [pytest.mark.slow])],
            )
            for name, shown in SHOWN.items()
        ],
    )


LIMITS = {"image": 3}


def limits_of(family):
    """Video needs torchvision."""
    return LIMITS | ({"video": 0} if "qwen" in family else {})


@pytest.fixture(scope="module")
def pattern_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patterns")
    return lambda name: write_pattern(folder / name, mask_of(name, KV_HEADS))


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


@by_family(QUICK)
@pytest.mark.feature("prefix caching", "chunked prefill")
def test_served_tokens_are_the_oracles(family, vision_model, pattern_of):
    """In chunks shorter than a picture, all together; then one by one, resuming at snapshots."""
    model = vision_model(family)
    with engine(
        model,
        pattern_of("mixed"),
        sink_size=SINK,
        recent_size=RECENT,
        max_num_batched_tokens=100,
        limit_mm_per_prompt=limits_of(family),
        skip_tokenizer_init=False,
        enable_prefix_caching=True,
    ) as running:
        asked = ask(running, family, prompts(), ANSWER)
        again = [ask(running, family, [each], ANSWER)[0] for each in prompts()]
        branches = branches_of(running, family)
    oracle = PictureOracle(model, mask_of("mixed", KV_HEADS), SINK, RECENT)
    around = 2 * ("qwen" in family)
    assert len(asked[3].token_ids) == TOKENS_OF_PICTURE[family] + 5 + around
    assert_oracles(oracle, asked + again + branches, ANSWER)
    full = PictureOracle(model, mask_of("retrieval", KV_HEADS), SINK, RECENT)
    with pytest.raises(AssertionError, match="step"):
        assert_oracles(full, asked[2:3], ANSWER)  # the picture alone is longer than a ring
    assert [each.cached for each in again] == [
        (len(each.token_ids) - 1) // BLOCK * BLOCK for each in again
    ]


def branches_of(running, family):
    """Prompts that part at a picture or behind one share what lies before that, and nothing more."""
    head, tail = words(100, 20), words(50, 21)
    end = 100 + TOKENS_OF_PICTURE[family] + ("qwen" in family)
    by_picture = [prompt(head, Picture(seed), tail) for seed in (11, 12, 13, 11)]
    behind = [prompt(head, Picture(11), words(50, seed)) for seed in (22, 23)]
    asked = [ask(running, family, [each], ANSWER)[0] for each in by_picture + behind]
    hits = [each.cached for each in asked]
    whole = (len(asked[0].token_ids) - 1) // BLOCK * BLOCK
    # The second prompt finds where it parts from the first and stores a snapshot there for the third.
    assert hits[:4] == [0, 0, 96, whole], hits
    # Where the next two part lies within the picture, down to a whole block.
    assert hits[4:] == [96, end // BLOCK * BLOCK], hits
    assert 100 < hits[5] < end
    return asked


@pytest.mark.slow
@pytest.mark.feature("image embeddings as input")
def test_embeddings_in_place_of_pictures(vision_model, pattern_of):
    """They are hashed by their numbers: others are not hit, the same ones are."""
    family, (head, tail) = "llava", (words(100, 40), words(50, 41))
    model = vision_model(family)
    oracle = PictureOracle(model, mask_of("mixed", KV_HEADS), SINK, RECENT)
    asks = [prompt(head, Picture(seed), tail) for seed in (1, 2, 1)]
    with engine(
        model,
        pattern_of("mixed"),
        sink_size=SINK,
        recent_size=RECENT,
        max_num_batched_tokens=100,
        limit_mm_per_prompt=limits_of(family),
        skip_tokenizer_init=False,
        enable_prefix_caching=True,
        enable_mm_embeds=True,
    ) as running:
        asked = [ask(running, family, [each], ANSWER, oracle.embeddings(each))[0] for each in asks]
    assert [each.cached for each in asked] == [0, 0, 336]
    assert_oracles(oracle, asked, ANSWER)


@by_family(QUICK[:1])
@pytest.mark.feature("every head a retrieval head")
def test_all_retrieval_equals_stock_vllm(family, vision_model, pattern_of):
    answers = []
    for pattern in (None, pattern_of("retrieval")):
        with engine(
            vision_model(family),
            pattern,
            block_size=32,
            max_num_batched_tokens=512,
            limit_mm_per_prompt=limits_of(family),
            skip_tokenizer_init=False,
        ) as running:
            answers.append([each.answer.tokens for each in ask(running, family, prompts(), ANSWER)])
    assert answers[0] == answers[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("streaming", {}, id="streaming"),
        pytest.param("exclusive", {"enforce_eager": False}, id="compiled"),
        pytest.param(
            "mixed",
            {
                "speculative_config": {
                    **{"method": "ngram", "num_speculative_tokens": 3},
                    **{"prompt_lookup_max": 2, "prompt_lookup_min": 1},
                }
            },
            id="ngram",
        ),
        pytest.param("mixed", {"kv_cache_dtype": "auto", "block_size": 128}, id="block-128"),
    ],
)
@pytest.mark.parametrize("family", QUICK)
def test_further_engines(family, name, settings, vision_model, pattern_of):
    model = vision_model(family)
    with engine(
        model,
        pattern_of(name),
        sink_size=SINK,
        recent_size=RECENT,
        limit_mm_per_prompt=limits_of(family),
        skip_tokenizer_init=False,
        **settings,
    ) as running:
        asked = ask(running, family, prompts(), ANSWER)
    assert_oracles(
        PictureOracle(model, mask_of(name, KV_HEADS), SINK, RECENT),
        asked,
        ANSWER,
    )


@pytest.mark.slow
@pytest.mark.feature("preemption")
@pytest.mark.parametrize("family", QUICK)
def test_a_small_pool_preempts_in_the_middle_of_pictures(family, vision_model, pattern_of):
    model = vision_model(family)
    rng = random.Random(30)
    asks = [
        prompt(words(rng.randrange(1, 60), 0), Picture(rng.randrange(3)), words(20, index))
        for index in range(12)
    ]
    with engine(
        model,
        pattern_of("mixed"),
        sink_size=SINK,
        recent_size=RECENT,
        max_model_len=400,
        max_num_batched_tokens=100,
        num_gpu_blocks_override=90,
        limit_mm_per_prompt=limits_of(family),
        skip_tokenizer_init=False,
        enable_prefix_caching=True,
    ) as running:
        preempted = running.record_preemptions()
        asked = ask(running, family, asks, 40)
    assert preempted
    assert_oracles(PictureOracle(model, mask_of("mixed", KV_HEADS), SINK, RECENT), asked, 40)


@pytest.mark.slow
@pytest.mark.feature("the text of a multimodal model alone")
@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl"])
def test_text_alone(family, vision_model, pattern_of):
    """Gemma 3 lets the tokens of an image see later ones; without images its decoder is causal."""
    model = vision_model(family)
    asks = prompts()[:2]
    with engine(
        model,
        pattern_of("mixed"),
        sink_size=SINK,
        recent_size=RECENT,
        language_model_only=True,
        skip_tokenizer_init=False,
    ) as running:
        asked = ask(running, family, asks, ANSWER)
    windows = [64, None, 64] if family == "gemma3" else ()
    oracle = PictureOracle(model, mask_of("mixed", KV_HEADS), SINK, RECENT, windows=windows)
    assert_oracles(oracle, asked, ANSWER)
