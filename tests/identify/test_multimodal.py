"""Multimodal models: the heads of the decoder are found, from text alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText

from tests.identify import tiny
from tests.identify.conftest import tiny_settings
from tests.models.vision_models import FAMILIES, make_vision_model
from vllm_duo.identify.model import load_model
from vllm_duo.identify.policies import full_policy
from vllm_duo.identify.refusals import TEXT_TESTED, config_reasons
from vllm_duo.identify.run import identify


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_is_hooked_without_a_change_of_its_output(family, tmp_path):
    folder = make_vision_model(family, tmp_path)
    hooked = load_model(str(folder), device="cpu", dtype=None)
    own = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(200)[None] + 3
    with torch.no_grad():
        expected = own.base_model(input_ids=ids, use_cache=False).last_hidden_state
        found = hooked.hidden(ids, full_policy)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    info = hooked.info
    assert (info.num_layers, info.num_heads, info.num_kv_heads, info.head_size) == (3, 8, 4, 32)
    assert info.max_positions == 4096
    assert info.windows == ((64, None, 64) if family == "gemma3" else ())


def small_llava():
    """Around the same decoder as the other tests'."""
    decoder = tiny.random_llama()
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **{"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2},
            **{"num_attention_heads": 2, "image_size": 16, "patch_size": 8},
        ),
        text_config=decoder.config,
        image_token_index=3,
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.lm_head.load_state_dict(decoder.lm_head.state_dict())
    return model


@pytest.mark.parametrize("method", ["gates", "induction", "on-the-fly"])
def test_values_are_those_of_the_decoder_alone(method, model_folder, tmp_path):
    size = {"steps": 3, "batch_size": 1} if method == "gates" else {"samples": 2}
    settings = tiny_settings(method=method, **size)
    llava = tiny.save(small_llava(), tmp_path / "llava")
    found = identify(str(llava), settings, tmp_path / "found").pattern
    expected = identify(str(model_folder), settings, tmp_path / "expected").pattern
    np.testing.assert_allclose(found.values, expected.values, atol=1e-6)


def test_others_are_refused():
    config = transformers.Idefics3Config()
    (reason,) = config_reasons(config)
    assert reason == (
        "multimodal input (model type idefics3): not tested, expected one of "
        f"{', '.join(TEXT_TESTED)}"
    )
