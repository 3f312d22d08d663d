"""Layers that draft over quantised KV caches: answers are those of what is kept without drafts.

What drafts keeps its keys and values in the format of ``--kv-cache-dtype`` too, as in stock vLLM, or in
one of its own. Whatever it keeps, an answer is of the model and its own cache. As in
``test_quantised_cache.py`` a served key crosses the edge of a quantisation step now and then.
"""

from __future__ import annotations

import pytest

from tests.e2e.drafts import Outcomes
from tests.e2e.engine import engine, ranks_of, write_pattern
from tests.e2e.half import errors, rms
from tests.e2e.stepper import Stepper
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.e2e.test_quantised_cache import BLOCK, ERROR, MATTERS, RECENT, SHAPE, SINK
from tests.models.eagle_heads import make_head
from tests.oracle import Oracle
from vllm_duo.compat.pool_report import LAYOUT
from vllm_duo.kv_cache.formats import FORMATS
from vllm_duo.planning.plan import PlanRequest, plan_memory

MASK = mask_of("uneven", SHAPE.kv_heads)  # a layer of both classes, and one of each alone
PROMPTS = prompts_of([150] * 4, seed=43)
ANSWER_TOKENS = 90
DRAFTS = 3
SHOWN = {
    "draft_model": "speculative decoding, draft model",
    "eagle": "speculative decoding, EAGLE head",
    "eagle3": "speculative decoding, EAGLE head",
}
CASES = [
    # --kv-cache-dtype, streaming_cache_dtype, what drafts, kv_cache_dtype of its own, ranks
    ("int4_per_token_head", "same", "draft_model", None, 1),
    ("fp8", "model", "eagle3", None, 1),
    ("int8_per_token_head", "same", "eagle", None, 1),
    ("int4_per_token_head", "model", "eagle", "auto", 1),
    ("int8_per_token_head", "model", "draft_model", "int4_per_token_head", 1),
    ("fp8", "same", "draft_model", None, 1),
    ("int4_per_token_head", "same", "eagle3", None, 1),
    ("fp8_per_token_head", "same", "eagle3", "fp8_e5m2", 1),
    ("auto", "same", "draft_model", "fp8", 1),
    ("int8_per_token_head", "model", "eagle", None, 2),
    ("int4_per_token_head", "same", "draft_model", "auto", 2),
]
QUICK = 2  # of these


def case(number, name, streaming, method, own, ranks):
    marks = [pytest.mark.feature(SHOWN[method], "preemption", "prefix caching")]
    if name in FORMATS:
        marks += [pytest.mark.feature(f"quantised KV cache, {name.partition('_')[0]}")]
    if streaming == "model":
        marks += [pytest.mark.feature("quantised KV cache, of the retrieval heads alone")]
    if number >= QUICK:
        marks += [pytest.mark.slow]
    identity = f"{name}-{streaming}-{method}" + f"-own {own}" * (own is not None)
    if ranks > 1:
        marks += [pytest.mark.feature("draft model or EAGLE head on several ranks")]
        identity += f"-{ranks} ranks"
    return pytest.param(name, streaming, method, own, ranks, id=identity, marks=marks)


def drafter(method, model, folder):
    """The model itself, whose heads then all see every token, or a head of copies of its layers."""
    return model if method == "draft_model" else make_head(model, method, folder)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("name", "streaming", "method", "own", "ranks"),
    [case(n, *each) for n, each in enumerate(CASES)],
)
def test_answers_are_those_of_what_is_kept(
    name, streaming, method, own, ranks, checkpoint, tmp_path, monkeypatch
):
    """In chunks, in a pool for four prompts and half of their answers, and at a cached prefix."""
    settings = ranks_of(ranks)
    model, pattern = checkpoint(SHAPE), write_pattern(tmp_path / "uneven", MASK)
    drafts = drafter(method, model, tmp_path)
    planned = plan_memory(
        PlanRequest(
            model=str(model),
            duo={
                **{"pattern": str(pattern), "threshold": 0.5, "sink_size": SINK},
                **{"recent_size": RECENT, "streaming_cache_dtype": streaming},
            },
            kv_cache_bytes=2**24,
            lengths=[len(PROMPTS[0]) + ANSWER_TOKENS // 2],
            max_model_len=400,
            dtype="float32",
            kv_cache_dtype=name,
            block_size=BLOCK,
            num_speculative_tokens=DRAFTS,
            draft_model=str(drafts),
            draft_kv_cache_dtype=own,
            tensor_parallel_size=ranks,
        )
    )
    with engine(
        model,
        pattern,
        sink_size=SINK,
        recent_size=RECENT,
        duo_settings={"streaming_cache_dtype": streaming},
        kv_cache_dtype=name,
        block_size=BLOCK,
        max_model_len=400,
        max_num_batched_tokens=128,
        num_gpu_blocks_override=1 + len(PROMPTS) * planned.by_length[0].blocks,
        **settings,
        speculative_config={
            "method": method,
            "model": str(drafts),
            "num_speculative_tokens": DRAFTS,
            "kv_cache_dtype": own,
        },
    ) as running:
        stepper = Stepper(running, monkeypatch)
        outcomes = Outcomes(stepper.scheduler, monkeypatch)
        answers = stepper.ask_all(PROMPTS, max_tokens=ANSWER_TOKENS)
        # One after the other, so that nobody else takes the blocks between.
        assert running.llm.reset_prefix_cache()
        alone, again = (
            stepper.ask(turn, PROMPTS[-1], max_tokens=ANSWER_TOKENS) for turn in ("alone", "again")
        )
        config = running.core.scheduler.kv_cache_config
        told = getattr(running.core.scheduler, LAYOUT).block_bytes  # on /metrics
        stored = {tensor.size // config.num_blocks for tensor in config.kv_cache_tensors}
    assert stepper.preempted
    # vLLM drops the last block of a hit where a head drafts.
    assert stepper.hit("again") == 144 - BLOCK * (method != "draft_model")
    assert sum(outcomes.accepted[count] for count in range(1, DRAFTS + 1)) > 20
    assert sum(outcomes.rejected.values()) > 20
    quantised = Oracle(
        model, MASK, SINK, RECENT, FORMATS.get(name), streaming_quantised=streaming == "same"
    )
    for prompts, served in ((PROMPTS, answers), (PROMPTS[-1:] * 2, [alone, again])):
        error = rms(errors(quantised, prompts, served))
        assert error <= ERROR
        if name in FORMATS:
            plain = rms(errors(Oracle(model, MASK, SINK, RECENT), prompts, served))
            assert plain > MATTERS * error, "what is kept must matter"
    assert stored == {planned.block_bytes} == {told}
