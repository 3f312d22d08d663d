"""Speculative decoding: the tokens of an engine without drafts, whatever is accepted or rejected."""

from __future__ import annotations

import dataclasses
import json
import random
from contextlib import contextmanager

import pytest
from vllm.sampling_params import StructuredOutputsParams

from tests.e2e.drafts import Outcomes, Scripted
from tests.e2e.engine import engine, write_pattern
from tests.e2e.needle import MODEL, RECENT, SINK, greedy_ids, prompts, serve, token_ids
from tests.e2e.stepper import Stepper
from tests.e2e.test_exactness import mask_of, prompts_of
from tests.models.eagle_heads import make_head
from tests.models.random_models import Shape
from tests.oracle import Oracle, assert_right, mismatches

pytestmark = pytest.mark.engine

NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 4,
    "prompt_lookup_min": 2,
}
NEEDLE = {"sink_size": SINK, "recent_size": RECENT, "max_model_len": 1024}
TIGHT = {"max_num_batched_tokens": 48, "num_gpu_blocks_override": 110}
TOKENS = 64
NUMBERS = StructuredOutputsParams(regex="( [0-9]{5}){6}")


@contextmanager
def needle(**settings):
    """The needle model, half of its heads streaming, and its tokenizer."""
    pattern = MODEL / "duo_pattern"
    with engine(MODEL, pattern, **NEEDLE, skip_tokenizer_init=False, **settings) as running:
        yield running


def ask(stepper, texts, turn=0, **sampling):
    """Answers to all texts, sent together."""
    for index, text in enumerate(texts):
        stepper.add(f"{turn}-{index}", text, **sampling)
    stepper.run()
    return [stepper.answer(f"{turn}-{index}") for index in range(len(texts))]


def tokens_of(answers):
    return [list(answer.tokens) for answer in answers]


@pytest.fixture(scope="module")
def texts():
    """Pass-key prompts of many lengths, two of which begin alike."""
    asked = [token_ids(p.text) for n in (150, 300, 420) for p in prompts(n, 3, hidden=n > 200)]
    return [*asked, asked[-1][:200] + asked[0]]


@pytest.fixture(scope="module")
def plain(texts):
    """The needle model's answers without drafts: free ones, and numbers only."""
    with needle() as running, pytest.MonkeyPatch.context() as patch:
        free = ask(Stepper(running, patch), texts, max_tokens=TOKENS)
        numbers = ask(Stepper(running, patch), texts, max_tokens=40, structured_outputs=NUMBERS)
    return free, numbers


class TestNgram:
    """One engine with prefix caching, whose pool is too small for all requests."""

    @pytest.fixture(scope="class")
    def drafting(self, plain):
        with needle(speculative_config=NGRAM, enable_prefix_caching=True, **TIGHT) as running:
            yield running

    @pytest.mark.feature("speculative decoding, n-gram", "prefix caching", "preemption")
    def test_drafts_change_no_token(self, drafting, texts, plain, monkeypatch):
        stepper = Stepper(drafting, monkeypatch)
        outcomes = Outcomes(stepper.scheduler, monkeypatch)
        for turn in range(2):
            served = ask(stepper, texts, turn, max_tokens=TOKENS)
            assert tokens_of(served) == tokens_of(plain[0])
        assert outcomes.accepted[0] > 20
        assert sum(outcomes.accepted[count] for count in range(1, 5)) > 20
        assert stepper.preempted
        assert sum(stepper.hit(f"1-{index}") for index in range(len(texts))) > 0

    @pytest.mark.feature("log-probabilities")
    def test_every_accepted_draft_has_its_log_probabilities(
        self, drafting, texts, plain, monkeypatch
    ):
        stepper = Stepper(drafting, monkeypatch)
        outcomes = Outcomes(stepper.scheduler, monkeypatch)
        for answer, expected in zip(ask(stepper, texts[:4]), plain[0], strict=False):
            for served, known in zip(answer.logprobs, expected.logprobs, strict=False):
                assert served == pytest.approx(known, abs=1e-3)
        assert sum(outcomes.accepted[count] for count in range(1, 5)) > 5

    @pytest.mark.feature("structured outputs")
    def test_a_grammar_allows_the_same_tokens(self, drafting, texts, plain, monkeypatch):
        stepper = Stepper(drafting, monkeypatch)
        outcomes = Outcomes(stepper.scheduler, monkeypatch)
        served = ask(stepper, texts, max_tokens=40, structured_outputs=NUMBERS)
        assert tokens_of(served) == tokens_of(plain[1])
        # Drafts that the grammar refuses are dropped before they are computed.
        assert sum(outcomes.accepted[count] for count in range(1, 5)) > 5
        assert sum(outcomes.rejected.values()) > 5


# Of the needle model: n-grams, or an EAGLE head of its layers.
DRAFTERS = pytest.mark.parametrize(
    "method",
    [
        pytest.param("ngram", marks=pytest.mark.feature("speculative decoding, n-gram")),
        pytest.param("eagle", marks=pytest.mark.feature("speculative decoding, EAGLE head")),
    ],
)


def drafts_by(method, folder):
    """``--speculative-config`` of a method of ``DRAFTERS``; a head is written into the folder."""
    if method == "ngram":
        return NGRAM
    head = make_head(MODEL, method, folder)
    return {"method": method, "model": str(head), "num_speculative_tokens": 3}


@pytest.mark.slow
@DRAFTERS
@pytest.mark.feature("torch.compile")
def test_compiled_model_gives_the_same_tokens(method, texts, plain, tmp_path, monkeypatch):
    drafts = drafts_by(method, tmp_path)
    with needle(speculative_config=drafts, enforce_eager=False) as running:
        stepper = Stepper(running, monkeypatch)
        outcomes = Outcomes(stepper.scheduler, monkeypatch)
        assert tokens_of(ask(stepper, texts, max_tokens=TOKENS)) == tokens_of(plain[0])
    assert sum(outcomes.accepted[count] for count in range(1, 5)) > 20
    assert sum(outcomes.rejected.values()) > 20


@pytest.mark.slow
@DRAFTERS
def test_a_server_with_drafts_gives_the_tokens_of_one_without(method, half_server, tmp_path):
    asked = [prompt for length in (256, 1024, 2048) for prompt in prompts(length, 5)]
    drafts = json.dumps(drafts_by(method, tmp_path))
    flags = ["--attention-backend", "duo", "--speculative-config", drafts]
    with serve(tmp_path / "log", *flags) as server:
        server.wait_until_ready()
        for _ in range(2):
            served = greedy_ids(server, asked, max_tokens=48)
            assert served == greedy_ids(half_server, asked, max_tokens=48)
        accepted, drafted = (
            sum(server.metrics(f"vllm:spec_decode_num_{what}_tokens_total").values())
            for what in ("accepted", "draft")
        )
    assert accepted > 20
    assert drafted - accepted > 20


SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
MASK = mask_of("mixed", SHAPE.kv_heads)
LENGTHS = (1, 19, 60, 96, 150, 333)


@pytest.fixture(scope="module")
def known(checkpoint, tmp_path_factory):
    """A model that shows one wrong key, its pattern, prompts, and their answers without drafts."""
    model = checkpoint(SHAPE)
    pattern = write_pattern(tmp_path_factory.mktemp("pattern"), MASK)
    asked = prompts_of(LENGTHS, seed=40)
    with engine(model, pattern) as running:
        answers = tokens_of(running.generate(asked, 200))
    return model, pattern, asked, answers


def wrong(known, answers):
    model, _, asked, _ = known
    oracle = Oracle(model, MASK, 20, 75)
    pairs = zip(asked, answers, strict=True)
    return [mismatches(oracle, prompt, a.tokens, a.logprobs) for prompt, a in pairs]


# Nine tokens of a request in a step are more than the decode kernel takes.
@pytest.mark.parametrize("drafts", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.feature("speculative decoding, custom proposer")
def test_rejected_drafts_leave_no_trace_at_any_slot_of_the_ring(drafts, known, monkeypatch):
    model, pattern, asked, answers = known
    texts = [prompt + answer for prompt, answer in zip(asked, answers, strict=True)]
    monkeypatch.setattr(Scripted, "texts", texts)
    with engine(
        model,
        pattern,
        enable_prefix_caching=drafts == 8,
        speculative_config={
            "method": "custom_class",
            "model": "tests.e2e.drafts.Scripted",
            "num_speculative_tokens": drafts,
        },
    ) as running:
        outcomes = Outcomes(running.core.scheduler, monkeypatch)
        served = running.generate(asked, 200)
        running.check_pool(idle=True)
        assert tokens_of(served) == answers
        assert wrong(known, served) == [[]] * len(asked)
        # Any number of them was accepted, and rejected ones have lain in every slot.
        assert all(outcomes.accepted[count] > 5 for count in range(drafts + 1))
        ring = 75 + drafts
        assert {(position - 20) % ring for position in outcomes.rejected if position >= 20} == set(
            range(ring)
        )
        if drafts == 4:
            assert any(wrong_without_slack(running, known, monkeypatch))


def wrong_without_slack(running, known, monkeypatch):
    """What the same engine answers once its ring is as long as without drafts."""
    from vllm_duo.attention.metadata import DuoMetadataBuilder
    from vllm_duo.ops.batch import RingTable

    make_table = DuoMetadataBuilder._make_table

    def mutated(self, common):
        table = make_table(self, common)
        if isinstance(table, RingTable):
            return dataclasses.replace(table, ring_size=table.recent_size)
        return table

    assert running.llm.reset_prefix_cache()
    with monkeypatch.context() as patch:
        patch.setattr(DuoMetadataBuilder, "_make_table", mutated)
        return wrong(known, running.generate(known[2], 200))


@pytest.mark.slow
@pytest.mark.feature("speculative decoding, custom proposer", "prefix caching", "preemption")
def test_a_small_pool_preempts_in_the_middle_of_drafts(known, monkeypatch):
    """Requests that share prefixes lose their blocks and resume at snapshots that drafts went past."""
    model, pattern, asked, answers = known
    whole = asked[-1] + answers[-1]
    monkeypatch.setattr(Scripted, "texts", [whole])
    cuts = random.Random(41).choices(range(100, len(asked[-1]) + 100), k=14)
    with engine(
        model,
        pattern,
        enable_prefix_caching=True,
        max_model_len=600,
        max_num_batched_tokens=64,
        max_num_seqs=8,
        num_gpu_blocks_override=130,
        speculative_config={
            "method": "custom_class",
            "model": "tests.e2e.drafts.Scripted",
            "num_speculative_tokens": 5,
        },
    ) as running:
        stepper = Stepper(running, monkeypatch)
        outcomes = Outcomes(stepper.scheduler, monkeypatch)
        for index, cut in enumerate(cuts):
            stepper.add(str(index), whole[:cut], max_tokens=min(70, len(whole) - cut))
            stepper.step(3)
        stepper.run()
        served = [stepper.answer(str(index)) for index in range(len(cuts))]
        hits = [stepper.hit(str(index)) for index in range(len(cuts))]
    assert_right(Oracle(model, MASK, 20, 75), [whole[:cut] for cut in cuts], served)
    assert stepper.preempted
    assert sum(hits) > 500
    assert len(outcomes.accepted) == 6


# Itself with every head a retrieval head is often right, and so are heads of copies of its layers;
# another model hardly ever.
DRAFT_SHAPES = {"itself": SHAPE, "another": Shape("llama", group=1, head_size=64, kv_heads=2)}
MODEL_DRAFTS = pytest.mark.feature("speculative decoding, draft model")
HEAD_DRAFTS = pytest.mark.feature(
    "speculative decoding, EAGLE head", "prefix caching", "preemption"
)


@pytest.fixture
def drafting(known, checkpoint, tmp_path):
    """Makes ``--speculative-config`` of something with layers that drafts for the known model."""

    def drafting(drafter):
        if drafter in DRAFT_SHAPES:
            method, folder = "draft_model", checkpoint(DRAFT_SHAPES[drafter])
        else:
            method, folder = drafter, make_head(known[0], drafter, tmp_path)
        return {"method": method, "model": str(folder), "num_speculative_tokens": 3}

    return drafting


@pytest.mark.parametrize(
    ("drafter", "caching"),
    [
        pytest.param("itself", True, marks=MODEL_DRAFTS),
        pytest.param("another", False, marks=[MODEL_DRAFTS, pytest.mark.slow]),
        pytest.param("eagle", True, marks=HEAD_DRAFTS),
        pytest.param("eagle3", True, marks=[HEAD_DRAFTS, pytest.mark.slow]),
        pytest.param("eagle3", False, marks=[HEAD_DRAFTS, pytest.mark.slow]),
    ],
)
def test_layers_that_draft_change_no_token(drafter, caching, known, drafting, monkeypatch):
    """They keep every token, in the blocks of the retrieval heads."""
    model, pattern, asked, answers = known
    with engine(
        model,
        pattern,
        speculative_config=drafting(drafter),
        enable_prefix_caching=caching,
        max_num_batched_tokens=100,
        # Room for two and a half of the longest requests: some are preempted.
        num_gpu_blocks_override=120,
        max_model_len=600,
    ) as running:
        stepper = Stepper(running, monkeypatch)
        outcomes = Outcomes(stepper.scheduler, monkeypatch)
        served = ask(stepper, asked, max_tokens=200)
        assert tokens_of(served) == answers
        if caching:
            # One after the other, so that nobody else takes the blocks between, and nothing known
            # before: of a chat that resumed once, what it resumed at is the first to go.
            assert running.llm.reset_prefix_cache()
            for name in ("alone", "again"):
                answer = stepper.ask(name, asked[-1], max_tokens=40)
                assert list(answer.tokens) == answers[-1][:40]
            assert stepper.hit("again") == 320 - 16 * (drafter != "itself")
    assert wrong(known, served) == [[]] * len(asked)
    assert stepper.preempted
    assert sum(outcomes.rejected.values()) > 50
    assert (sum(outcomes.accepted[count] for count in (1, 2, 3)) > 50) == (drafter != "another")


@pytest.mark.parametrize("method", ["eagle", pytest.param("eagle3", marks=pytest.mark.slow)])
@HEAD_DRAFTS
def test_a_head_drafts_as_for_stock_vllm(method, known, drafting, tmp_path, monkeypatch):
    """With every head a retrieval head: the same drafts after the same hits."""
    model, _, asked, _ = known
    every = write_pattern(tmp_path / "every", mask_of("retrieval", SHAPE.kv_heads))
    found = []
    for pattern in (None, every):
        with (
            # Of stock's attention on CPUs blocks are multiples of 32.
            engine(model, pattern, block_size=32, speculative_config=drafting(method)) as running,
            pytest.MonkeyPatch.context() as patch,
        ):
            stepper = Stepper(running, patch)
            outcomes = Outcomes(stepper.scheduler, patch)
            served = [ask(stepper, asked, turn, max_tokens=60) for turn in range(2)]
            hits = [stepper.hit(f"1-{index}") for index in range(len(asked))]
            found.append(
                ([tokens_of(s) for s in served], outcomes.accepted, outcomes.rejected, hits)
            )
    stock, duo = found
    assert duo == stock
    tokens, accepted, _, hits = duo
    assert tokens[0] == tokens[1]
    assert len(accepted) == 4
    assert hits == [0, 0, 0, 32, 96, 288]
