"""Every task: its prompt fits, holds what is asked for, and its score tells right from wrong."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import pytest

from vllm_duo.evaluate.prompts import PlainPrompts, plain_text
from vllm_duo.evaluate.task import Sample, Wanted, haystack
from vllm_duo.evaluate.tasks import TASKS, arithmetic, copying


def count_words(text: str) -> int:
    """A tokenizer of words, with a token at the start."""
    return 1 + len(re.findall(r"\w+|[^\w\s]", text))


def wanted(tokens: int = 800, seed: int = 0, depth: float = 0.5) -> Wanted:
    prompts = PlainPrompts(count_words)
    return Wanted(tokens=tokens, depth=depth, rng=random.Random(seed), prompts=prompts)


def made(name: str, **settings) -> list[Sample]:
    samples = TASKS[name].make(wanted(**settings))
    assert samples
    return samples


def prompt_of(sample: Sample) -> str:
    return plain_text(sample.turns, sample.start)


def right_answer(sample: Sample) -> str:
    return " " + ", ".join(sample.answers) + "."


@pytest.mark.parametrize("name", TASKS)
class TestEach:
    def test_first_turn_fills_the_length_and_no_more(self, name):
        for seed in range(5):
            first, *_ = made(name, seed=seed)
            assert 740 <= count_words(prompt_of(first)) <= 800

    def test_same_seed_same_samples(self, name):
        assert made(name) == made(name)
        assert made(name) != made(name, seed=1)

    def test_right_answer_scores_one(self, name):
        for sample in made(name):
            assert TASKS[name].score(sample, right_answer(sample)) == 1

    @pytest.mark.parametrize("wrong", ["", " 00000.", " nothing at all"])
    def test_wrong_answer_scores_nothing(self, name, wrong):
        for sample in made(name):
            assert TASKS[name].score(sample, wrong) == 0

    def test_answer_fits_the_tokens_it_is_given(self, name):
        for sample in made(name):
            # The needle model spells digits: five tokens a number and one for its comma.
            numbers = sum(len(answer) if answer.isdigit() else 1 for answer in sample.answers)
            assert TASKS[name].max_tokens >= numbers + len(sample.answers)

    def test_too_short_a_length_is_refused(self, name):
        with pytest.raises(ValueError, match="tokens"):
            made(name, tokens=20)

    def test_question_does_not_give_the_answer(self, name):
        for sample in made(name):
            question = prompt_of(sample).split(". ")[-1]
            assert not any(
                re.search(rf"\b{answer}\b", question)
                for answer in sample.answers
                if name != "arithmetic"  # its numbers are small
            )


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"arithmetic"}))
def test_answers_stand_in_the_text(name):
    for sample in made(name):
        assert all(answer in prompt_of(sample) for answer in sample.answers)


@pytest.mark.parametrize("name", ["needle", "copying"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_depth_is_where_the_answer_stands(name, depth):
    (sample,) = made(name, depth=depth)
    place = prompt_of(sample).index(sample.answers[0]) / len(prompt_of(sample))
    assert abs(place - depth) < 0.35
    assert sample.depth == depth


def test_variables_form_a_chain():
    (sample,) = made("variable-tracking")
    links = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", prompt_of(sample)))
    (asked,) = set(re.findall(r"have the value (\d+)", prompt_of(sample)))
    for name in sample.answers:
        while name in links:
            name = links[name]
        assert name == asked
    assert len(links) == 2 * len(sample.answers)


def test_common_words_are_the_most_common():
    (sample,) = made("common-words")
    words = re.findall(r"\d+\. (\w+)", prompt_of(sample))
    rarest = min(words.count(word) for word in sample.answers)
    assert rarest > max(words.count(word) for word in set(words) - set(sample.answers))


def test_sums_are_right():
    (sample,) = made("arithmetic")
    value = int(re.search(r"x0 is (\d+)", prompt_of(sample))[1])
    for step, answer in enumerate(sample.answers, start=1):
        sign, amount = re.search(
            rf"x{step} is x{step - 1} (plus|minus) (\d)", prompt_of(sample)
        ).groups()
        value += int(amount) if sign == "plus" else -int(amount)
        assert str(value) == answer


def test_sums_score_up_to_the_first_error():
    sample = Sample(turns=("",), start="", answers=("5", "11", "3"), length=1)
    assert arithmetic.score(sample, " 5, x2 = 11, x3 = 3") == 1
    assert arithmetic.score(sample, " 5, x2 = 12, x3 = 3") == pytest.approx(1 / 3)


def test_copy_scores_numbers_at_their_place():
    sample = Sample(turns=("",), start="", answers=("11", "22", "33", "44"), length=1)
    assert copying.score(sample, "11, 99, 33") == 0.5
    assert copying.score(sample, "22, 33, 44") == 0


def test_later_turns_begin_with_the_earlier_ones():
    turns = made("multi-turn")
    assert [sample.turn for sample in turns] == [0, 1, 2]
    for before, after in pairwise(turns):
        assert prompt_of(after).startswith(prompt_of(before) + f" {before.answers[0]}. ")


def test_facts_keep_their_order_in_the_haystack():
    text = haystack(wanted(), "Begin.", ["One.", "Two.", "Three."], "End?", "It")
    assert text.index("Begin.") < text.index("One.") < text.index("Two.") < text.index("Three.")
    assert text.endswith("End?")
