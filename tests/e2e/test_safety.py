"""Every scheduler event, prefix caching off and on: right answers, and a whole pool at every step."""

from __future__ import annotations

import random

import pytest

from tests.e2e.engine import engine, write_pattern
from tests.e2e.stepper import Stepper
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.models.random_models import Shape
from tests.oracle import Oracle, mismatches

pytestmark = pytest.mark.engine

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
SINK, RECENT = 20, 75
MASK = mask_of("mixed", SHAPE.kv_heads)
CHUNK = 64
# A prompt of 300 tokens holds 19 retrieval and 6 streaming blocks of 16 tokens, its answer of 64
# tokens 4 more: two prompts fit, and three once answers are short; three answers do not.
POOL_BLOCKS = 80


@pytest.fixture(scope="module")
def model(checkpoint):
    return checkpoint(SHAPE)


@pytest.fixture(scope="module", params=[False, True], ids=["no-caching", "caching"])
def running(request, model, tmp_path_factory):
    pattern = write_pattern(tmp_path_factory.mktemp("pattern"), MASK)
    with engine(
        model,
        pattern,
        sink_size=SINK,
        recent_size=RECENT,
        enable_prefix_caching=request.param,
        scheduling_policy="priority",
        max_model_len=700,
        max_num_batched_tokens=2 * CHUNK,
        long_prefill_token_threshold=CHUNK,
        max_num_seqs=8,
        num_gpu_blocks_override=POOL_BLOCKS + 1,
    ) as started:
        yield started


@pytest.fixture
def caching(running):
    return running.manager.enable_caching


@pytest.fixture
def stepper(running, monkeypatch):
    """The engine with nothing cached; afterwards nothing may be left in it."""
    assert running.llm.reset_prefix_cache()
    stepper = Stepper(running, monkeypatch)
    yield stepper
    stepper.run()


@pytest.fixture
def oracle(model):
    return Oracle(model, MASK, SINK, RECENT)


def assert_right(oracle, prompt, answer):
    assert mismatches(oracle, prompt, answer.tokens, answer.logprobs) == []


def test_preempted_requests_resume(stepper, oracle):
    prompts = prompts_of([300] * 6, seed=20)
    for index, prompt in enumerate(prompts):
        stepper.add(str(index), prompt, max_tokens=64)
    stepper.run()
    assert stepper.preempted
    for index, prompt in enumerate(prompts):
        assert_right(oracle, prompt, stepper.answer(str(index)))


class TestAbort:
    """A bystander must get its answer, and the aborted prompt asked again the right one."""

    BYSTANDER, VICTIM = prompts_of([90, 300], seed=21)

    @pytest.fixture(autouse=True)
    def start(self, stepper):
        stepper.add("bystander", self.BYSTANDER, max_tokens=64)
        stepper.step(3)
        self.stepper = stepper

    def abort_and_check(self, oracle):
        self.stepper.engine.abort_request(["victim"])
        self.check(oracle)

    def check(self, oracle):
        self.stepper.check()
        assert not any(key.startswith("victim") for key in self.stepper.scheduler.requests)
        assert_right(oracle, self.VICTIM, self.stepper.ask("again", self.VICTIM))
        assert_right(oracle, self.BYSTANDER, self.stepper.answer("bystander"))

    def test_while_waiting(self, oracle):
        self.stepper.add("victim", self.VICTIM)
        self.abort_and_check(oracle)

    def test_between_two_chunks_of_its_prompt(self, oracle):
        self.stepper.add("victim", self.VICTIM)
        self.stepper.step(2)
        assert 0 < self.stepper.request("victim").num_computed_tokens < len(self.VICTIM)
        self.abort_and_check(oracle)

    def test_while_it_answers(self, oracle):
        self.stepper.add("victim", self.VICTIM)
        self.stepper.step(20)
        assert self.stepper.request("victim").num_output_tokens > 5
        self.abort_and_check(oracle)

    def test_while_it_is_preempted(self, oracle):
        self.stepper.add("victim", self.VICTIM, priority=1)
        self.stepper.step(3)
        with self.stepper.blocks_left(0):
            while not self.stepper.preempted:
                self.stepper.step()
            assert self.stepper.request("victim").status.name == "PREEMPTED"
            self.stepper.engine.abort_request(["victim"])
            self.stepper.check()
        self.check(oracle)

    @pytest.mark.parametrize("moment", [1, 20], ids=["mid-prompt", "mid-answer"])
    def test_while_a_step_with_it_runs(self, moment, oracle, monkeypatch):
        """As the engine core meets it: the abort arrives while the model computes."""
        self.stepper.add("victim", self.VICTIM)
        self.stepper.step(moment)
        core = self.stepper.running.core
        execute = core.model_executor.execute_model

        def abort_meanwhile(*args, **kwargs):
            result = execute(*args, **kwargs)
            core.aborts_queue.put_nowait([self.stepper.request("victim").request_id])
            return result

        with monkeypatch.context() as patch:
            patch.setattr(core.model_executor, "execute_model", abort_meanwhile)
            self.stepper.engine.step()
        self.abort_and_check(oracle)

    def test_just_finished(self, oracle):
        """The client goes while the last token is on its way to it."""
        self.stepper.add("victim", self.VICTIM, max_tokens=1)
        request = self.stepper.request("victim")
        while not request.is_finished():
            self.stepper.step()
        self.stepper.running.core.abort_requests([request.request_id])
        self.check(oracle)

    def test_twice(self, oracle):
        self.stepper.add("victim", self.VICTIM)
        self.stepper.step(2)
        request_id = self.stepper.request("victim").request_id
        for _ in range(2):
            self.stepper.running.core.abort_requests([request_id])
            self.stepper.check()
        self.abort_and_check(oracle)


class TestSeveralAnswers:
    # Three prompts fit one step: vLLM 0.32 on a CPU cannot cut a seeded request's prompt into chunks
    # ("CPU Generator does not use offset"), whatever the attention backend.
    PROMPT = prompts_of([40], seed=22)[0]

    def test_sampled_ones_are_those_of_single_requests(self, stepper):
        stepper.add("all", self.PROMPT, n=3, temperature=1.0, seed=5)
        stepper.run()
        completions = sorted(stepper.outputs["all"].outputs, key=lambda one: one.index)
        together = [completion.token_ids for completion in completions]
        for index in range(3):
            stepper.ask(str(index), self.PROMPT, temperature=1.0, seed=5 + index)
        alone = [stepper.outputs[str(index)].outputs[0].token_ids for index in range(3)]
        assert together == alone
        assert len(set(map(tuple, together))) == 3

    def test_greedy_ones_are_right(self, stepper, oracle):
        # vLLM refuses n > 1 at temperature 0; of one candidate there is nothing to sample.
        stepper.add("both", self.PROMPT, n=2, temperature=1.0, top_k=1)
        stepper.run()
        assert len(stepper.outputs["both"].outputs) == 2
        for completion in stepper.outputs["both"].outputs:
            rows = [{t: p.logprob for t, p in row.items()} for row in completion.logprobs]
            assert mismatches(oracle, self.PROMPT, completion.token_ids, rows) == []

    def test_aborted_ones_leave_nothing(self, stepper):
        stepper.add("all", self.PROMPT, n=3, temperature=1.0, seed=5)
        stepper.step(6)
        stepper.engine.abort_request(["all"])
        stepper.run()


class TestPriority:
    def test_an_urgent_request_preempts_a_running_one(self, stepper, oracle):
        urgent, *others = prompts_of([250, 300, 300, 300], seed=23)
        for index, prompt in enumerate(others):
            stepper.add(str(index), prompt, priority=5, max_tokens=64)
        stepper.step(8)
        stepper.add("urgent", urgent, priority=-1, max_tokens=64)
        stepper.run()
        assert stepper.preempted
        assert not any(key.startswith("urgent") for key in stepper.preempted)
        assert_right(oracle, urgent, stepper.answer("urgent"))
        for index, prompt in enumerate(others):
            assert_right(oracle, prompt, stepper.answer(str(index)))

    def test_tokens_of_a_step_that_took_them_back_are_never_hit(self, stepper, oracle, caching):
        """The victim's chunk is planned and its blocks have hashes; then the same step drops it."""
        victim, urgent = prompts_of([400, 30], seed=24)
        stepper.add("victim", victim, priority=5)
        stepper.step()
        stepper.add("urgent", urgent, priority=0)
        while stepper.request("urgent").num_tokens % 16 != 1:
            stepper.step()
        assert stepper.request("victim").num_computed_tokens < len(victim) - CHUNK
        # The victim, first in line, gets its next chunk's blocks, and the urgent one lacks a block.
        with stepper.blocks_left(CHUNK // 16):
            stepper.step()
        assert stepper.withdrawn == caching
        stepper.run()
        for name in ("victim", "urgent"):
            assert_right(oracle, {"victim": victim, "urgent": urgent}[name], stepper.answer(name))
        assert_right(oracle, victim, stepper.ask("again", victim))
        assert stepper.hit("again") == (384 if caching else 0)
