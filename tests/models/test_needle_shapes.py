"""Models of other shapes that the needle script trains: read back, they are what was trained."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.needle_training import export
from models.needle_training.model import Needle, Shape
from models.needle_training.vocabulary import build_tokenizer

TEXT = "Anna found the map. The pass key is 47193. What is the pass key?"


@pytest.mark.parametrize(("kv_heads", "qkv_bias"), [(4, False), (2, True)])
def test_checkpoint_is_the_trained_model(tmp_path, kv_heads, qkv_bias):
    torch.manual_seed(0)
    words = len(build_tokenizer())
    model = Needle(Shape(vocab=words, layers=2, heads=4, kv_heads=kv_heads, qkv_bias=qkv_bias))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    export.save_checkpoint(model, tmp_path)

    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXT, return_tensors="pt").input_ids
    assert ids.tolist() == [build_tokenizer()(TEXT).input_ids]
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert torch.allclose(read(ids).logits, model.logits(model(ids)), atol=1e-4)

    again = Needle(model.shape)
    export.load_weights(again, tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
