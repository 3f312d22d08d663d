"""config.json of multimodal models as vLLM reads it: the figures of the decoder."""

from __future__ import annotations

import json

import pytest

from tests.planning.models import GIB, checkered, write_model
from tests.planning.test_checkpoint import vllm_config
from tests.server.configs import GEMMA_3_IMAGES, LLAVA, QWEN_2_VL
from tests.this_process import this_process  # noqa: F401 - a fixture
from tests.vision import vision  # noqa: F401 - a fixture
from vllm_duo.model_facts import TEXT_ALONE
from vllm_duo.planning.checkpoint import read_checkpoint
from vllm_duo.planning.plan import PlanRequest, plan_memory
from vllm_duo.support import facts_of

pytestmark = pytest.mark.usefixtures("vision")

# As published, without what the decoder's cache does not depend on.
LLAVA_1_5 = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 32000,
    "model_type": "llava",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "torch_dtype": "float16",
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
}
QWEN_2_VL_7B = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584},
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}
QWEN_2_5_VL_7B = QWEN_2_VL_7B | {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "max_position_embeddings": 128000,
    "model_type": "qwen2_5_vl",
    "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584},
}
MISTRAL_SMALL_3_1 = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 10,
    "model_type": "mistral3",
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "sliding_window": None,
        "vocab_size": 131072,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"model_type": "pixtral", "image_size": 1540, "patch_size": 14},
}
MODELS = {
    "LLaVA-1.5": LLAVA_1_5,
    "Qwen2-VL": QWEN_2_VL_7B,
    "Qwen2.5-VL": QWEN_2_5_VL_7B,
    "Mistral Small 3.1": MISTRAL_SMALL_3_1,
    "small LLaVA": LLAVA,
    "small Qwen2-VL": QWEN_2_VL,
    "Qwen2-VL that slides": QWEN_2_VL | {"use_sliding_window": True, "max_window_layers": 1},
    "Gemma 3": GEMMA_3_IMAGES,
}


@pytest.fixture
def model(tmp_path):
    def model(config: dict) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return model


@pytest.mark.parametrize("name", MODELS)
def test_as_vllm_reads_them(model, name):
    folder = model(MODELS[name])
    theirs, ours = vllm_config(folder), read_checkpoint(folder)
    assert ours.facts == facts_of(theirs)
    assert ours.max_model_len == theirs.max_model_len
    assert ours.is_known


def test_what_a_text_config_leaves_out(model):
    ours = read_checkpoint(model(LLAVA_1_5))
    facts = ours.facts
    assert (facts.num_layers, facts.num_kv_heads, facts.head_size) == (32, 32, 128)
    assert (ours.max_model_len, ours.dtype) == (4096, "float16")


class TestPlan:
    def test_is_that_of_the_decoder(self, model, tmp_path):
        """Each of 28 layers has 4 heads, of which half keep K and V of 128 numbers of 2 bytes."""
        pattern = checkered(tmp_path / "pattern", 28, 4)
        request = PlanRequest(
            model=model(QWEN_2_VL_7B), duo={"pattern": pattern}, kv_cache_bytes=16 * GIB
        )
        plan = plan_memory(request)
        assert plan.bytes_per_token == 28 * 2 * 2 * 128 * 2
        assert plan.settings.max_model_len == 32768

    def test_layers_that_draft_are_refused_as_by_the_server(self, model, tmp_path):
        request = {
            "model": model(QWEN_2_VL_7B),
            "duo": {"pattern": checkered(tmp_path / "pattern", 28, 4)},
            "kv_cache_bytes": 16 * GIB,
            "num_speculative_tokens": 2,
            "draft_model": write_model(tmp_path / "draft", 1, 4, 4, 512),
        }
        for alone in (False, True):
            with pytest.raises(
                NotImplementedError, match="a multimodal model of the type qwen2_vl"
            ):
                plan_memory(PlanRequest(**request, language_model_only=alone))

    def test_layers_that_draft_are_planned_as_by_the_server(self, model, tmp_path):
        """A layer of 4 heads of 128 beside half of 28 of them."""
        plan = plan_memory(
            PlanRequest(
                model=model(QWEN_2_5_VL_7B),
                duo={"pattern": checkered(tmp_path / "pattern", 28, 4)},
                kv_cache_bytes=16 * GIB,
                num_speculative_tokens=2,
                draft_model=write_model(tmp_path / "draft", 1, 4, 4, 512),
            )
        )
        assert plan.bytes_per_token == (28 * 2 + 4) * 2 * 128 * 2

    def test_text_alone_is_planned_where_images_are_refused(self, model, tmp_path):
        pattern = checkered(tmp_path / "pattern", 2, 2)
        request = {
            "model": model(GEMMA_3_IMAGES),
            "duo": {"pattern": pattern},
            "kv_cache_bytes": GIB,
        }
        with pytest.raises(NotImplementedError, match=TEXT_ALONE):
            plan_memory(PlanRequest(**request))
        plan = plan_memory(PlanRequest(**request, language_model_only=True))
        assert plan.settings.sliding_layers == 1
