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

    @pytest.mark.feature("aborted requests")
    def test_between_two_chunks_of_its_prompt(self, oracle):
        self.stepper.add("victim", self.VICTIM)
        self.stepper.step(2)
        assert 0 < self.stepper.request("victim").num_computed_tokens < len(self.VICTIM)
        self.abort_and_check(oracle)

    @pytest.mark.feature("aborted requests")
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

    @pytest.mark.feature("several answers (`n`)", "seeded sampling")
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

    @pytest.mark.feature("several answers (`n`)")
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
        assert not stepper.scheduler.requests
        stepper.run()
        assert stepper.outputs == {}


class TestPriority:
    @pytest.mark.feature("priority scheduling", "preemption")
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


class TestCacheReset:
    PROMPTS = prompts_of([200, 260], seed=25)

    def ask_all(self, stepper, oracle, tag):
        """Right answers; returns the hits."""
        for index, prompt in enumerate(self.PROMPTS):
            assert_right(oracle, prompt, stepper.ask(f"{tag}{index}", prompt))
        return [stepper.hit(f"{tag}{index}") for index in range(len(self.PROMPTS))]

    @pytest.mark.feature("reset of the prefix cache")
    def test_nothing_is_hit_afterwards(self, stepper, oracle, caching):
        self.ask_all(stepper, oracle, "first")
        assert self.ask_all(stepper, oracle, "warm") == ([192, 256] if caching else [0, 0])
        assert stepper.running.llm.reset_prefix_cache()
        assert self.ask_all(stepper, oracle, "cold") == [0, 0]

    def test_is_refused_while_requests_run(self, stepper, oracle, caching):
        self.ask_all(stepper, oracle, "first")
        stepper.add("running", self.PROMPTS[0])
        stepper.step(5)
        assert not stepper.running.llm.reset_prefix_cache()
        stepper.check()
        stepper.run()
        assert_right(oracle, self.PROMPTS[0], stepper.answer("running"))
        assert self.ask_all(stepper, oracle, "warm") == ([192, 256] if caching else [0, 0])

    @pytest.mark.parametrize("moment", [2, 12], ids=["mid-prompt", "mid-answer"])
    @pytest.mark.feature("reset of the prefix cache")
    def test_with_running_requests_starts_them_again(self, moment, stepper, oracle):
        self.ask_all(stepper, oracle, "first")
        for index, prompt in enumerate(self.PROMPTS):
            stepper.add(str(index), [*prompt[:-1], 7], max_tokens=40)
        stepper.step(moment)
        assert len(stepper.scheduler.running) == 2
        assert stepper.running.llm.reset_prefix_cache(reset_running_requests=True)
        stepper.check()
        assert not any(block.block_hash for block in stepper.pool.blocks)
        stepper.run()
        for index, prompt in enumerate(self.PROMPTS):
            assert_right(oracle, [*prompt[:-1], 7], stepper.answer(str(index)))
        assert len(stepper.preempted) == 2


class TestSleep:
    """A CPU has no memory to give back: vLLM pauses its scheduler, and says so where asked for more."""

    PROMPTS = prompts_of([150, 250], seed=26)

    @pytest.mark.feature("pausing (sleep levels 0 and 1)")
    def test_kept_requests_go_on_and_queued_ones_start(self, stepper, oracle):
        stepper.add("before", self.PROMPTS[0])
        stepper.step(6)
        stepper.running.llm.sleep(level=0, mode="keep")
        stepper.add("meanwhile", self.PROMPTS[1])
        stepper.step(3)
        assert stepper.request("before").num_output_tokens < 6
        stepper.running.llm.wake_up(tags=["scheduling"])
        stepper.run()
        for name, prompt in zip(("before", "meanwhile"), self.PROMPTS, strict=True):
            assert_right(oracle, prompt, stepper.answer(name))

    @pytest.mark.feature("pausing (sleep levels 0 and 1)")
    def test_level_1_ends_what_runs_and_forgets_what_is_cached(self, stepper, oracle):
        stepper.ask("first", self.PROMPTS[0])
        stepper.add("running", self.PROMPTS[1])
        stepper.step(6)
        stepper.running.llm.sleep(level=1)
        assert stepper.running.llm.llm_engine.is_sleeping()
        stepper.check()
        assert stepper.pool.get_num_free_blocks() == POOL_BLOCKS
        stepper.engine.abort_request(["running"])  # the in-process engine does not tell the client
        stepper.running.llm.wake_up()
        for index, prompt in enumerate(self.PROMPTS):
            assert_right(oracle, prompt, stepper.ask(str(index), prompt))
            assert stepper.hit(str(index)) == 0

    @pytest.mark.refused("`--enable-sleep-mode`")
    def test_sleep_mode_gets_vllms_own_answer(self, model):
        from vllm import EngineArgs

        with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
            EngineArgs(
                str(model), attention_backend="duo", enable_sleep_mode=True
            ).create_engine_config()


class TestLookUp:
    """Who may read the cache, and who may not."""

    PROMPT = prompts_of([150], seed=27)[0]

    @pytest.mark.feature("prompt log-probabilities")
    def test_prompt_logprobs_are_computed_not_read(self, stepper, oracle, caching):
        stepper.ask("first", self.PROMPT)
        stepper.ask("scored", self.PROMPT, prompt_logprobs=2)
        assert stepper.hit("scored") == 0
        assert_right(oracle, self.PROMPT, stepper.answer("scored"))
        reference = oracle.logprobs(self.PROMPT)
        first, *rows = stepper.outputs["scored"].prompt_logprobs
        assert first is None
        for row, expected in zip(rows, reference, strict=False):
            for token, entry in row.items():
                assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-2)
        stepper.ask("last", self.PROMPT)
        assert stepper.hit("last") == (144 if caching else 0)

    @pytest.mark.feature("cache_salt")
    def test_a_salt_keeps_users_apart(self, stepper, oracle, caching):
        hits = []
        for index, salt in enumerate(("one", "two", "one", None, "two")):
            assert_right(oracle, self.PROMPT, stepper.ask(str(index), self.PROMPT, salt=salt))
            hits.append(stepper.hit(str(index)))
        assert hits == ([0, 0, 144, 0, 144] if caching else [0] * 5)


def test_async_scheduling_stays_off_on_a_cpu(running):
    """vLLM's CPU platform switches it off; should that change, the managers need a second look."""
    assert running.llm.llm_engine.vllm_config.scheduler_config.async_scheduling is False


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))]
)
def test_any_mix_of_events(seed, stepper, oracle, caching):
    """Shared prefixes, priorities, aborts and forced resets, more than the pool can hold."""
    rng = random.Random(seed)
    shared = prompts_of([120, 260, 330], seed=28)
    prompts, aborted = {}, set()
    for index in range(50):
        name = f"r{index}"
        prefix = rng.choice(shared)[: rng.randrange(1, 331)]
        prompts[name] = prefix + prompts_of([rng.randrange(1, 120)], seed=100 * seed + index)[0]
        stepper.add(
            name, prompts[name], priority=rng.randrange(3), max_tokens=rng.choice([1, 9, 40, 90])
        )
        stepper.step(rng.choice([0, 0, 3, 15]))
        if rng.random() < 0.2:
            victim = rng.choice(sorted(prompts.keys() - stepper.outputs.keys() - aborted) or [name])
            stepper.engine.abort_request([victim])
            aborted.add(victim)
        if rng.random() < 0.05:
            stepper.running.llm.reset_prefix_cache(reset_running_requests=rng.random() < 0.5)
        stepper.check()
    stepper.run()
    assert stepper.preempted
    assert caching == (sum(output.num_cached_tokens for output in stepper.outputs.values()) > 0)
    assert stepper.outputs.keys() == prompts.keys() - (aborted - stepper.outputs.keys())
    for name, output in stepper.outputs.items():
        if output.outputs[0].finish_reason == "length":
            assert_right(oracle, prompts[name], stepper.answer(name))
