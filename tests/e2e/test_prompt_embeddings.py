"""Prompts that are embeddings instead of tokens (``--enable-prompt-embeds``): the oracle's answers."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from tests.e2e.engine import answer_of, engine, write_pattern
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.models.random_models import Shape
from tests.oracle import Oracle, assert_right

pytestmark = pytest.mark.engine

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
SINK, RECENT = 20, 75
MASK = mask_of("mixed", SHAPE.kv_heads)
NEW_TOKENS = 24
# Of one length: to vLLM their tokens are the same placeholders, and only the embeddings differ.
PROMPTS = prompts_of([333, 333, 333], seed=61)


@pytest.mark.feature("prompts as embeddings")
def test_answers_are_the_oracles_and_prefixes_are_kept_apart(checkpoint, tmp_path):
    """In chunks; the second time the prompts resume at snapshots of their own."""
    model = checkpoint(SHAPE)
    table = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    asked = [{"prompt_embeds": table[prompt]} for prompt in PROMPTS]
    sizes = {"sink_size": SINK, "recent_size": RECENT, "max_num_batched_tokens": 100}
    pattern = write_pattern(tmp_path, MASK)
    with engine(model, pattern, enable_prompt_embeds=True, **sizes) as running:
        for hit in (0, 320):  # whole blocks of 16 tokens
            outputs = running.llm.generate(asked, running.sampling(NEW_TOKENS), use_tqdm=False)
            answers = [answer_of(output) for output in outputs]
            assert_right(Oracle(model, MASK, SINK, RECENT), PROMPTS, answers, NEW_TOKENS)
            assert [output.num_cached_tokens for output in outputs] == [hit] * len(PROMPTS)
