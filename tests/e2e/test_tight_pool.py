"""A pool with room for one request of max-model-len and not a block more, prefix caching on."""

from __future__ import annotations

import pytest

from tests.e2e.engine import engine, write_pattern
from tests.e2e.stepper import Stepper
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.models.random_models import Shape
from tests.oracle import Oracle, mismatches
from vllm_duo.kv_cache.layout import KVShape, plan_layout

pytestmark = pytest.mark.engine

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
SINK, RECENT = 20, 75
MAX_MODEL_LEN = 400
MASKS = {
    "one bin": mask_of("mixed", SHAPE.kv_heads),
    "several bins": [[True, False, False, False]] * 3,
}


def pool_blocks(mask):
    """Blocks of one request of max-model-len, and vLLM's own."""
    retrieval = tuple(sum(layer) for layer in mask)
    layout = plan_layout(
        KVShape(
            retrieval_heads=retrieval,
            streaming_heads=tuple(SHAPE.kv_heads - n for n in retrieval),
            head_size=SHAPE.head_size,
            dtype_bytes=4,
        ),
        block_size=16,
        sink_size=SINK,
        recent_size=RECENT,
    )
    return 1 + layout.blocks(MAX_MODEL_LEN)


@pytest.mark.parametrize("name", MASKS)
def test_a_hit_never_keeps_a_request_out(name, checkpoint, tmp_path, monkeypatch):
    """Each prompt begins with the one before, down to the last token that fits."""
    mask, model = MASKS[name], checkpoint(SHAPE)
    prompts = [prompts_of([399], seed=30)[0][:length] for length in (70, 150, 393, 399)]
    prompts += [prompts[0][:33] + prompts_of([340], seed=31)[0]]
    with engine(
        model,
        write_pattern(tmp_path / "pattern", mask),
        sink_size=SINK,
        recent_size=RECENT,
        enable_prefix_caching=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=pool_blocks(mask),
    ) as running:
        stepper, oracle = Stepper(running, monkeypatch), Oracle(model, mask, SINK, RECENT)
        for index, prompt in enumerate(prompts):
            answer = stepper.ask(str(index), prompt, max_tokens=min(30, 400 - len(prompt)))
            assert mismatches(oracle, prompt, answer.tokens, answer.logprobs) == []
        hits = [stepper.hit(str(index)) for index in range(len(prompts))]
    assert hits[:2] == [0, 64], hits
