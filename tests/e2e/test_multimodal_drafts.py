"""Models that take images, and layers that draft for them from the tokens that stand for an image."""

from __future__ import annotations

import pytest

from tests.e2e.drafts import Outcomes
from tests.e2e.pictures import (
    BLOCK,
    ask,
    assert_oracles,
    prompts,
)
from tests.e2e.test_multimodal import SHOWN
from tests.models.eagle_heads import make_head
from tests.models.vision_models import make_decoder
from tests.vision import vision  # noqa: F401 - a fixture

ANSWER = 120

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("vision")]


def case(family, method, *marks):
    shown = "draft model" if method == "draft_model" else "EAGLE head"
    features = (f"speculative decoding, {shown}", SHOWN[family], "preemption")
    return pytest.param(family, method, marks=[pytest.mark.feature(*features), *marks])


def drafts_of(method, model, folder):
    """``--speculative-config`` of the model's decoder, or of a head of its layers."""
    decoder = make_decoder(model, folder)
    drafter = decoder if method == "draft_model" else make_head(decoder, method, folder)
    return {"method": method, "model": str(drafter), "num_speculative_tokens": 3}


@pytest.mark.parametrize(
    ("family", "method"),
    [
        case("llava", "draft_model"),
        case("llava", "eagle", pytest.mark.slow),
        case("llava", "eagle3", pytest.mark.slow),
        case("mistral3", "draft_model", pytest.mark.slow),
        case("mistral3", "eagle", pytest.mark.slow),
        case("mistral3", "eagle3", pytest.mark.slow),
        case("qwen2_5_vl", "draft_model", pytest.mark.slow),
        case("qwen2_5_vl", "eagle", pytest.mark.slow),
        case("qwen2_5_vl", "eagle3", pytest.mark.slow),
    ],
)
def test_layers_that_draft_change_no_token(
    family, method, vision_model, picture_engine, picture_oracle, tmp_path, monkeypatch
):
    """All together in a pool that is too small for them; then resuming behind a picture."""
    with picture_engine(
        family,
        max_model_len=1000,
        num_gpu_blocks_override=100,
        enable_prefix_caching=True,
        speculative_config=drafts_of(method, vision_model(family), tmp_path),
    ) as running:
        preempted = running.record_preemptions()
        outcomes = Outcomes(running.core.scheduler, monkeypatch)
        asked = ask(running, family, prompts(), ANSWER)
        # One after the other, so that nobody else takes the blocks between.
        assert running.llm.reset_prefix_cache()
        alone, again = (ask(running, family, prompts()[2:3], ANSWER)[0] for _ in range(2))
    assert_oracles(picture_oracle(family), [*asked, alone, again], ANSWER)
    assert preempted
    # vLLM drops the last block of a hit where a head drafts.
    whole = (len(again.token_ids) - 1) // BLOCK * BLOCK
    assert again.cached == whole - BLOCK * (method != "draft_model")
    assert sum(outcomes.accepted[count] for count in (1, 2, 3)) > 10
    assert sum(outcomes.rejected.values()) > 10


@pytest.mark.slow
@pytest.mark.feature("the text of a multimodal model alone", "speculative decoding, draft model")
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_text_alone(family, vision_model, picture_engine, picture_oracle, tmp_path, monkeypatch):
    with picture_engine(
        family,
        language_model_only=True,
        speculative_config=drafts_of("draft_model", vision_model(family), tmp_path),
    ) as running:
        outcomes = Outcomes(running.core.scheduler, monkeypatch)
        asked = ask(running, family, prompts()[:2], ANSWER)
    assert_oracles(picture_oracle(family), asked, ANSWER)
    assert sum(outcomes.accepted[count] for count in (1, 2, 3)) > 10
    assert sum(outcomes.rejected.values()) > 10
