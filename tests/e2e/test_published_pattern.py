"""A Llama-3.1-8B by shape (random weights, narrow hidden size) with its published pattern."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from tests.e2e.engine import engine
from tests.published import published_layout

pytestmark = pytest.mark.engine

PATTERN = "Meta-Llama-3.1-8B-Instruct"


@pytest.mark.feature("published head patterns")
def test_the_pattern_is_found_by_the_models_name_and_planned_groups_run(tmp_path):
    model = tmp_path / "Llama-3.1-8B-Instruct"
    LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=256,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(model)
    layout = published_layout(PATTERN, dtype_bytes=4, block_size=16)
    with engine(
        model,
        attention_backend="duo",
        load_format="dummy",
        max_model_len=1024,
        num_gpu_blocks_override=200,
    ) as running:
        (answer,) = running.generate([list(range(200)) * 3], max_tokens=8)
        assert len(answer.tokens) == 8
        config = running.manager.kv_cache_config
        assert config.kv_cache_tensors[0].size // config.num_blocks == layout.block_bytes
        groups = config.kv_cache_groups
        assert len(groups) == 1 + len(layout.bins)
        assert len(groups[0].layer_names) == sum(n > 0 for n in layout.shape.retrieval_heads)
        assert [len(g.layer_names) for g in groups[1:]] == [len(layers) for layers in layout.bins]
