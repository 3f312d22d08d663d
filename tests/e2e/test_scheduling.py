"""What the scheduler does must not show in the answers, and every block comes back."""

from __future__ import annotations

import pytest

from tests.e2e.engine import MAX_NEW_TOKENS, answer_of, engine, write_pattern
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.models.random_models import Shape
from tests.oracle import Oracle, assert_right

pytestmark = pytest.mark.engine

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
SINK, RECENT = 20, 75
LENGTHS = (1, 19, 20, 21, 95, 96, 300, 700)
MASK = mask_of("mixed", SHAPE.kv_heads)


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint(SHAPE)


@pytest.fixture(scope="module")
def pattern(tmp_path_factory):
    return write_pattern(tmp_path_factory.mktemp("pattern"), MASK)


def assert_answers(model, prompts, answers):
    assert_right(Oracle(model, MASK, SINK, RECENT), prompts, answers, MAX_NEW_TOKENS)


@pytest.mark.parametrize(("chunk", "sequences"), [(16, 16), (100, 32)])
@pytest.mark.feature("chunked prefill")
def test_small_chunks_give_the_same_tokens(chunk, sequences, model, pattern):
    prompts = prompts_of(LENGTHS)
    with engine(model, pattern, max_num_batched_tokens=chunk, max_num_seqs=sequences) as running:
        answers = running.generate(prompts)
    assert_answers(model, prompts, answers)


@pytest.mark.feature("continuous batching")
def test_alone_and_in_a_batch_of_32_give_the_same_tokens(model, pattern):
    prompts = prompts_of([*LENGTHS, *range(3, 300, 13), 500], seed=1)
    assert len(prompts) == 32
    with engine(model, pattern) as running:
        together = running.generate(prompts)
        alone = [running.generate([prompt])[0] for prompt in prompts[: len(LENGTHS)]]
    assert [a.tokens for a in alone] == [a.tokens for a in together[: len(LENGTHS)]]
    assert_answers(model, prompts, together)


@pytest.mark.feature("preemption")
def test_a_forced_preemption_changes_nothing(model, pattern, monkeypatch):
    prompts = prompts_of([300] * 6, seed=2)
    # A prompt of 300 tokens holds 19 retrieval and 2 + 5 streaming blocks of 16 tokens, its answer
    # takes 4 more: three prompts fit into 79 blocks, three answers do not.
    with engine(model, pattern, max_model_len=400, num_gpu_blocks_override=80) as running:
        preempted = []
        scheduler = running.core.scheduler
        preempt = scheduler._preempt_request

        def record(request, *args, **kwargs):
            preempted.append(request.request_id)
            result = preempt(request, *args, **kwargs)
            running.check_pool(idle=False)
            return result

        monkeypatch.setattr(scheduler, "_preempt_request", record)
        answers = running.generate(prompts)
    assert preempted, "the pool was meant to be too small for all requests"
    assert_answers(model, prompts, answers)


@pytest.mark.feature("aborted requests")
def test_aborted_requests_leave_no_trace(model, pattern):
    """Half the requests are aborted at different moments, one in the middle of its prefill."""
    prompts = prompts_of([150, 700, 40, 300, 96, 20, 150, 33], seed=3)
    with engine(model, pattern, max_num_batched_tokens=100) as running:
        llm_engine = running.llm.llm_engine
        for index, prompt in enumerate(prompts):
            llm_engine.add_request(str(index), {"prompt_token_ids": prompt}, running.sampling())
        finished, step = {}, 0
        while llm_engine.has_unfinished_requests():
            for output in llm_engine.step():
                if output.finished and output.outputs[0].finish_reason == "length":
                    finished[int(output.request_id)] = answer_of(output)
            step += 1
            running.check_pool(idle=False)
            for moment, victim in ((3, 1), (6, 3), (12, 0), (40, 6)):
                if step == moment:
                    llm_engine.abort_request([str(victim)])
    assert sorted(finished) == [2, 4, 5, 7]
    assert_answers(model, [prompts[i] for i in (2, 4, 5, 7)], [finished[i] for i in (2, 4, 5, 7)])


@pytest.mark.feature("torch.compile")
def test_compiled_model_gives_the_same_tokens(model, pattern):
    """vLLM's default mode: torch.compile, the attention as one opaque operator."""
    prompts = prompts_of(LENGTHS, seed=4)
    with engine(model, pattern, enforce_eager=False, max_num_batched_tokens=256) as running:
        assert running.is_compiled()
        answers = running.generate(prompts)
    assert_answers(model, prompts, answers)


@pytest.mark.feature("every head a retrieval head")
def test_all_retrieval_equals_stock_vllm(model, tmp_path):
    """Both run the same model code, so nothing but the order of sums may differ."""
    prompts = prompts_of(LENGTHS, seed=5)
    all_heads = write_pattern(tmp_path / "all", [[True] * SHAPE.kv_heads] * len(MASK))
    with engine(model, block_size=128, num_gpu_blocks_override=800) as running:
        stock = running.generate(prompts)
    with engine(model, all_heads, block_size=128, num_gpu_blocks_override=800) as running:
        duo = running.generate(prompts)
    for ours, theirs in zip(duo, stock, strict=True):
        assert ours.tokens == theirs.tokens
        for mine, row in zip(ours.logprobs, theirs.logprobs, strict=True):
            for token in mine.keys() & row.keys():
                assert mine[token] == pytest.approx(row[token], abs=1e-3)
