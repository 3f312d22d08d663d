"""Servers of models that take images: which start, and with what of duo's."""

from __future__ import annotations

import re

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.models.vision_models import make_vision_model
from tests.server.configs import (
    GEMMA_3_IMAGES,
    IDEFICS_3,
    LLAVA,
    QWEN_2_VL,
    draft_model,
    reasons_of,
)
from tests.vision import vision  # noqa: F401 - a fixture
from vllm_duo.server_plan import resolve_plan

pytestmark = pytest.mark.usefixtures("vision")


@pytest.mark.parametrize("config", [LLAVA, QWEN_2_VL], ids=lambda config: config["model_type"])
def test_the_pattern_is_of_the_decoder(serve, config):
    plan = resolve_plan(serve(config))
    assert plan.resolved.selection.retrieval.shape == (2, 2)
    assert plan.windows == ()


@pytest.mark.refused("images whose tokens see later ones")
def test_gemma_3_with_images(serve):
    (reason,) = reasons_of(serve, GEMMA_3_IMAGES)
    assert reason.startswith("images whose tokens attend to later ones (model type gemma3): duo's")


@pytest.mark.parametrize(
    "settings",
    [{"language_model_only": True}, {"limit_mm_per_prompt": {"image": 0}}],
    ids=["language_model_only", "limit of 0"],
)
@pytest.mark.parametrize(
    "config", [GEMMA_3_IMAGES, IDEFICS_3], ids=lambda config: config["model_type"]
)
def test_text_alone_is_served(serve, config, settings):
    serve(config, **settings)


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
def test_layers_that_draft(serve, tmp_path, method):
    serve(LLAVA, speculative_config=draft_model(tmp_path / "draft", method=method))


@pytest.mark.parametrize("method", ["draft_model", "eagle"])
@pytest.mark.parametrize("alone", [False, True], ids=["images", "text alone"])
@pytest.mark.refused("drafts of layers, for other multimodal models")
def test_layers_that_draft_for_others(serve, tmp_path, method, alone):
    """vLLM 0.32 asks Qwen2-VL's config for the token of an image by a name that it does not have."""
    drafts = draft_model(tmp_path / "draft", method=method)
    reason = (
        "what drafts: not tested with a multimodal model of the type qwen2_vl, expected one of llava, "
        "mistral3, qwen2_5_vl; use ngram"
    )
    settings = {"speculative_config": drafts, "language_model_only": alone}
    assert reasons_of(serve, QWEN_2_VL, **settings) == [reason]


def test_a_multimodal_model_that_drafts(serve, tmp_path):
    drafts = draft_model(tmp_path / "draft", LLAVA)
    (reason,) = reasons_of(serve, speculative_config=drafts)
    assert reason == "what drafts: a model that takes images (llava): use a text model"


@pytest.mark.refused("multimodal models in vLLM's Transformers backend")
def test_transformers_backend(tmp_path):
    """There vLLM asks the processor which kinds of input there are, so it must be in the folder."""
    folder = make_vision_model("llava", tmp_path)
    server = EngineArgs(
        model=str(folder),
        model_impl="transformers",
        attention_backend="duo",
        dtype="float32",
    )
    reason = "multimodal input (model type llava in vLLM's Transformers backend): not tested"
    with pytest.raises(NotImplementedError, match=re.escape(reason)):
        server.create_engine_config()
