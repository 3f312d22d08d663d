"""Models that take images, and layers that draft for them from the tokens that stand for an image."""

from __future__ import annotations

import pytest

from tests.e2e.drafts import Outcomes
from tests.e2e.engine import engine, write_pattern
from tests.e2e.pictures import PictureOracle, ask, assert_oracles
from tests.e2e.test_exactness import mask_of
from tests.e2e.test_multimodal import ANSWER, RECENT, SHOWN, SINK, limits_of, prompts
from tests.models.eagle_heads import make_head
from tests.models.vision_models import KV_HEADS, make_decoder
from tests.vision import vision  # noqa: F401 - a fixture

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("vision")]


def case(family, method, *marks):
    shown = "draft model" if method == "draft_model" else "EAGLE head"
    features = (f"speculative decoding, {shown}", SHOWN[family], "preemption")
    return pytest.param(family, method, marks=[pytest.mark.feature(*features), *marks])


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
    ],
)
def test_layers_that_draft_change_no_token(family, method, vision_model, tmp_path, monkeypatch):
    """All together in a pool that is too small for them; then one by one, resuming at snapshots."""
    model = vision_model(family)
    decoder = make_decoder(model, tmp_path)
    drafter = decoder if method == "draft_model" else make_head(decoder, method, tmp_path)
    with engine(
        model,
        write_pattern(tmp_path / "mixed", mask_of("mixed", KV_HEADS)),
        sink_size=SINK,
        recent_size=RECENT,
        max_model_len=1000,
        max_num_batched_tokens=100,
        num_gpu_blocks_override=110,
        limit_mm_per_prompt=limits_of(family),
        skip_tokenizer_init=False,
        enable_prefix_caching=True,
        speculative_config={
            "method": method,
            "model": str(drafter),
            "num_speculative_tokens": 3,
        },
    ) as running:
        preempted = running.record_preemptions()
        outcomes = Outcomes(running.core.scheduler, monkeypatch)
        asked = ask(running, family, prompts(), ANSWER)
        again = [ask(running, family, [each], ANSWER)[0] for each in prompts()]
    oracle = PictureOracle(model, mask_of("mixed", KV_HEADS), SINK, RECENT)
    assert_oracles(oracle, asked + again, ANSWER)
    assert preempted
    assert sum(each.cached for each in again) > 500
    assert sum(outcomes.accepted[count] for count in (1, 2, 3)) > 10
    assert sum(outcomes.rejected.values()) > 10
