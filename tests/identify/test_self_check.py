"""The self-check: accuracy as greedy decoding would give it, and its verdicts."""

from __future__ import annotations

import pytest
import torch

from tests.identify import tiny
from tests.identify.conftest import make_job
from vllm_duo import HeadPattern
from vllm_duo.identify.attention import StreamingRule
from vllm_duo.identify.haystack import MadeText
from vllm_duo.identify.model import load_model
from vllm_duo.identify.policies import ClassPolicy, full_policy
from vllm_duo.identify.samples import SampleMaker
from vllm_duo.identify.self_check import CheckResult, accuracy, check_pattern, wilson_interval


def result(full, chosen, streaming, samples=40):
    return CheckResult(samples, 100, 0.5, full, chosen, streaming, {0.5: chosen}, 0.0)


@pytest.mark.parametrize(
    ("full", "chosen", "streaming", "verdict"),
    [
        (1.0, 1.0, 0.0, "trusted"),
        (1.0, 0.95, 0.0, "trusted"),
        (1.0, 0.925, 0.0, "not trusted"),
        (0.4, 0.4, 0.0, "cannot be judged"),  # the model cannot do it itself
        (1.0, 1.0, 0.85, "cannot be judged"),  # nothing needed to be retrieved
    ],
)
def test_verdict(full, chosen, streaming, verdict):
    assert result(full, chosen, streaming).verdict == verdict


def test_needle_model_needs_its_heads():
    """Accuracy agrees with what is known of the model: all with full attention, none streaming."""
    model = load_model(str(tiny.NEEDLE), device="cpu", dtype=None)
    maker = SampleMaker(model.tokenizer, MadeText(), 0, (200, 200))
    samples = maker.make_hidden("check", 4, 16, 64)
    assert accuracy(model, samples, full_policy) == 1.0
    none = ClassPolicy(torch.zeros(4, 4, dtype=torch.bool), StreamingRule(16, 64))
    assert accuracy(model, samples, none) == 0.0


def test_accuracy_is_that_of_generated_text():
    model = load_model(str(tiny.NEEDLE), device="cpu", dtype=None)
    maker = SampleMaker(model.tokenizer, MadeText(), 3, (120, 200))
    samples = [maker.make("check", number) for number in range(3)]
    # Half of the first layer streams with little in sight: some answers come out wrong.
    rule = ClassPolicy(torch.arange(16).view(4, 4) >= 4, StreamingRule(2, 6))
    for sample in samples:
        prompt = list(sample.ids[: sample.keys[0][0]])
        with torch.no_grad():
            for _ in range(8):
                hidden = model.hidden(torch.tensor([prompt]), rule)[0, -1]
                prompt.append(int(model.logits(hidden).argmax()))
        text = model.tokenizer.decode(prompt[sample.keys[0][0] :])
        wanted = model.tokenizer.decode(sample.ids[slice(*sample.keys[0])])
        right = text.startswith(wanted) and not text[len(wanted) : len(wanted) + 1].isdecimal()
        assert accuracy(model, [sample], rule) == float(right), (text, wanted)


@pytest.mark.parametrize(("following", "right"), [(".", 1.0), ("7", 0.0)])
def test_a_key_that_goes_on_is_wrong(following, right):
    job = make_job(tiny.random_llama())
    sample = job.samples().make("check", 0)
    words = job.model.tokenizer
    answer = [sample.ids[row + 1] for row in sample.key_queries()]
    answer.append(words.convert_tokens_to_ids(following))
    scores = torch.nn.functional.one_hot(torch.tensor(answer), len(words)).float()
    object.__setattr__(job.model, "logits", lambda hidden: scores)
    assert accuracy(job.model, [sample], full_policy) == right
    assert accuracy(job.model, [sample], full_policy, key_style="words") == 1.0


@pytest.fixture
def checked(monkeypatch):
    """The samples that the self-check measures with."""

    def get(job):
        seen = []

        def look(model, samples, policy, style):
            seen.extend(samples)
            return 1.0

        monkeypatch.setattr("vllm_duo.identify.self_check.accuracy", look)
        check_pattern(job, HeadPattern.uniform(2, 2))
        return seen

    return get


def test_check_uses_samples_that_the_method_did_not_see(checked):
    job = make_job(tiny.random_llama(), max_length=96, min_length=96)
    seen = checked(job)
    learned = {job.samples().make("identify", number).ids for number in range(50)}
    assert seen
    assert not {sample.ids for sample in seen} & learned
    assert all(sample.hidden(tiny.SINK, tiny.RECENT) for sample in seen)


def test_check_asks_for_one_key(checked):
    job = make_job(tiny.random_llama(), keys=2, max_length=140, min_length=120)
    assert {len(sample.keys) for sample in checked(job)} == {1}


def test_wilson_interval_of_known_shares():
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)
    low, high = wilson_interval(1.0, 40)
    assert (low, high) == pytest.approx((0.912, 1.0), abs=1e-3)
