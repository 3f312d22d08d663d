"""What a request may ask for beside tokens, through HTTP, half of the heads streaming."""

from __future__ import annotations

import pytest

from tests.e2e.needle import client_of, prompts
from vllm_duo.evaluate.passkey import is_correct

pytestmark = pytest.mark.engine

PROMPT = prompts(700, 1)[0]  # longer than what streaming heads keep


@pytest.fixture(scope="module")
def ask(half_server):
    client = client_of(half_server)

    def ask(**options):
        request = {"model": "needle", "prompt": PROMPT.text, "max_tokens": 12, "temperature": 0}
        return client.completions.create(**(request | options))

    return ask


@pytest.fixture(scope="module")
def plain(ask):
    text = ask().choices[0].text
    assert is_correct(PROMPT, text)
    return text


@pytest.mark.feature("streaming")
def test_a_stream_is_the_answer_in_parts(ask, plain):
    parts = [chunk.choices[0].text for chunk in ask(stream=True)]
    assert len(parts) > 3
    assert "".join(parts) == plain


@pytest.mark.feature("stop strings")
def test_a_stop_string_ends_the_answer_before_it(ask, plain):
    stop = plain.strip()[2:4]
    choice = ask(stop=[stop]).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == plain[: plain.index(stop)]


@pytest.mark.feature("structured outputs")
def test_a_regular_expression_is_kept_and_the_key_found(ask):
    choice = ask(extra_body={"structured_outputs": {"regex": " ?[0-9]{5}"}}).choices[0]
    assert choice.text.strip() == PROMPT.answer


@pytest.mark.feature("structured outputs")
def test_a_choice_among_wrong_keys(ask):
    wrong = [str((int(PROMPT.answer) + step) % 10**5).zfill(5) for step in (1, 20, 300)]
    choices = [f" {each}" for each in (*wrong, PROMPT.answer)]
    text = ask(extra_body={"structured_outputs": {"choice": choices}}).choices[0].text
    assert text.strip() == PROMPT.answer


@pytest.mark.feature("penalties")
def test_a_penalty_keeps_a_token_from_coming_again(ask):
    """Without one the model repeats digits and words; with the strongest a token comes once."""
    tokens = {}
    for penalty in (0, 2):
        choice = ask(
            max_tokens=60,
            presence_penalty=penalty,
            frequency_penalty=penalty,
            logprobs=0,
            extra_body={"ignore_eos": True, "repetition_penalty": 1.0 + 20 * penalty},
        ).choices[0]
        tokens[penalty] = choice.logprobs.tokens
    assert len(set(tokens[0])) < 50
    assert len(set(tokens[2])) > len(set(tokens[0]))


@pytest.mark.feature("beam search")
def test_two_beams_differ_and_the_better_one_is_right(ask):
    beams = ask(n=2, extra_body={"use_beam_search": True}).choices
    assert len(beams) == 2
    assert beams[0].text != beams[1].text
    assert is_correct(PROMPT, beams[0].text)
