"""config.json as vLLM reads it: the same figures and the same refusals, without vLLM."""

from __future__ import annotations

import json

import pytest
from vllm.engine.arg_utils import EngineArgs

from tests.server.configs import GPT_OSS, config_json
from tests.server.refused import REFUSED_MODELS
from tests.this_process import this_process  # noqa: F401 - a fixture
from vllm_duo.model_facts import model_refusals
from vllm_duo.planning.checkpoint import DEFAULTS, TEXT_TYPES, read_checkpoint
from vllm_duo.support import facts_of

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
REQUIRED = {
    "hidden_size": 2048,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


@pytest.fixture
def model(tmp_path):
    def model(config: object) -> str:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
        return str(tmp_path)

    return model


def vllm_config(folder: str):
    return EngineArgs(model=folder, skip_tokenizer_init=True).create_model_config()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_key_value_heads": 4},
        {"head_dim": 96},
        {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2},
        {"sliding_window": 64, "use_sliding_window": True, "layer_types": MIXED},
        {"sliding_window": 64, "sliding_window_pattern": 2},
        {"sliding_window": None},
        {"dtype": "float16"},
    ],
    ids=lambda settings: ", ".join(f"{key}={value}" for key, value in settings.items()) or "least",
)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_known_types_as_vllm_reads_them(model, model_type, settings):
    config = {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type}
    folder = model(config | REQUIRED | settings)
    theirs = vllm_config(folder)
    ours = read_checkpoint(folder)
    assert ours.facts == facts_of(theirs)
    assert ours.max_model_len == theirs.max_model_len
    assert ours.is_known


def test_every_known_type_is_compared():
    assert {*ARCHITECTURES, *TEXT_TYPES.values()} == set(DEFAULTS)


@pytest.mark.parametrize("kinds", [None, ["full_attention", "sliding_attention"]])
def test_gpt_oss_as_vllm_reads_it(model, kinds):
    """Its RoPE stretches the length, which is not guessed, so it is not among the known types."""
    folder = model(GPT_OSS if kinds is None else GPT_OSS | {"layer_types": kinds})
    facts = read_checkpoint(folder).facts
    assert facts == facts_of(vllm_config(folder))
    assert facts.windows == ((32, None) if kinds is None else (None, 32))


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3"])
def test_null_is_the_number_of_heads(model, model_type):
    config = {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type}
    folder = model(config | REQUIRED | {"num_key_value_heads": None})
    assert read_checkpoint(folder).facts.num_kv_heads == 32
    assert vllm_config(folder).get_total_num_kv_heads() == 32


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_models_that_the_server_refuses(model, name):
    config, *reasons = REFUSED_MODELS[name]
    assert list(model_refusals(read_checkpoint(model(config)).facts)) == reasons


@pytest.mark.parametrize("kind", ["llama3", "longrope", "default"])
def test_scaling_that_leaves_the_length_alone(model, kind):
    scaling = {"rope_type": kind}
    folder = model(config_json("LlamaForCausalLM", "llama", rope_scaling=scaling))
    assert read_checkpoint(folder).max_model_len == 256


def test_scaling_that_stretches_the_length_is_not_guessed(model):
    scaling = {"type": "yarn", "factor": 4.0}
    folder = model(config_json("LlamaForCausalLM", "llama", rope_scaling=scaling))
    assert read_checkpoint(folder).max_model_len is None


class TestBadInput:
    def test_no_folder_and_nothing_in_the_cache(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="found neither: correct the name, or fetch the one"):
            read_checkpoint("some-org/no-such-model")

    def test_path_that_is_no_model_id(self):
        with pytest.raises(ValueError, match="found neither"):
            read_checkpoint("/no/such/folder")

    def test_folder_without_config(self, tmp_path):
        with pytest.raises(ValueError, match=r"expected a folder with config\.json, found"):
            read_checkpoint(str(tmp_path))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "text that does not parse"),
            ("[]", "expected a JSON object, got list"),
            ("{}", "num_attention_heads or .*, got no such key"),
        ],
    )
    def test_file(self, model, text, message):
        with pytest.raises(ValueError, match=message):
            read_checkpoint(model(text))

    @pytest.mark.parametrize("value", ["32", 0, -1, 1.5, True, 10_001, 2**32, 2**63])
    @pytest.mark.parametrize("key", ["num_hidden_layers", "num_key_value_heads"])
    def test_figure(self, model, key, value):
        """A figure that lists are made of has a bound: 2**32 layers took all of a machine's memory."""
        config = config_json("LlamaForCausalLM", "llama") | {key: value}
        with pytest.raises(ValueError, match=rf"{key} or .*, a whole number from 1 to 10,000, got"):
            read_checkpoint(model(config))


def test_model_in_the_hub_cache(tmp_path, monkeypatch):
    """The layout of Hugging Face's cache: refs/main names the snapshot."""
    import huggingface_hub.constants

    repository = tmp_path / "models--some-org--Some-Model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text(json.dumps(config_json("LlamaForCausalLM", "llama")))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert read_checkpoint("some-org/Some-Model").facts.num_layers == 2
