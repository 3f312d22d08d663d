"""Questions through a chat template: what is written, what is counted, what is refused."""

from __future__ import annotations

import json
import random
from io import StringIO
from itertools import pairwise

import pytest
from rich.console import Console

from tests.e2e.needle import MODEL
from tests.evaluate.chat_models import CHATML, SPECIAL, copy_needle, write_tokenizer
from tests.evaluate.test_run import settings_of
from tests.evaluate.test_tasks import count_words
from vllm_duo.evaluate import run as module
from vllm_duo.evaluate.prompts import ChatPrompts, PlainPrompts, load_chat, make_prompts
from vllm_duo.evaluate.report import tables
from vllm_duo.evaluate.run import evaluate
from vllm_duo.evaluate.task import Wanted
from vllm_duo.evaluate.tasks import TASKS
from vllm_duo.evaluate.tokenizer import load_tokenizer
from vllm_duo.report.load import load_results
from vllm_duo.report.render import render

BOS = SPECIAL.index("<s>")
NEEDLES_OWN = "chat_template.jinja"


def prompts_of(settings):
    return make_prompts(settings, count_words, load_chat(settings))


@pytest.fixture
def chat(tmp_path) -> ChatPrompts:
    return ChatPrompts.load(str(write_tokenizer(tmp_path / "model", CHATML)))


class TestText:
    def test_answer_is_an_assistants_message_that_was_begun(self, chat):
        assert chat.text(("Who is it?",), "It is") == (
            "<s><|im_start|> user\nWho is it? <|im_end|>\n<|im_start|> assistant\nIt is"
        )

    def test_generation_prompt_where_no_answer_was_begun(self, chat):
        assert chat.text(("Who is it?",), "").endswith("<|im_end|>\n<|im_start|> assistant\n")

    def test_turns_alternate(self, chat):
        text = chat.text(("One?", "1.", "Two?"), "It")
        roles = [line.split()[-1] for line in text.splitlines() if "im_start" in line]
        assert roles == ["user", "assistant", "user", "assistant"]

    def test_special_tokens_are_the_templates_alone(self, chat):
        ids = chat.asked(("Who?",), "It")["prompt_token_ids"]
        assert ids.count(BOS) == 1  # the tokenizer by itself puts one more before every text
        assert ids[0] == BOS
        assert chat.tokenizer("Who?")["input_ids"].count(BOS) == 1
        assert chat.count(("Who?",), "It") == len(ids)

    def test_plain_text_is_left_to_the_server(self):
        plain = PlainPrompts(count_words)
        assert plain.asked(("One?", "1.", "Two?"), "It is") == {"prompt": "One? 1. Two? It is"}
        assert plain.count(("One?",), "It is") == 1 + 4
        assert plain.count_text("It is") == 2


@pytest.mark.parametrize("name", TASKS)
def test_templated_prompts_fill_the_length_and_no_more(chat, name):
    for seed in range(3):
        wanted = Wanted(tokens=800, depth=0.5, rng=random.Random(seed), prompts=chat)
        first, *_ = TASKS[name].make(wanted)
        assert 740 <= len(chat.asked(first.turns, first.start)["prompt_token_ids"]) <= 800


def test_template_takes_its_share_of_the_length(chat):
    long = ChatPrompts(chat.tokenizer)
    long.tokenizer.chat_template = CHATML.replace("{{ bos_token }}", "<s>" + 300 * " word")
    wanted = Wanted(tokens=800, depth=0.5, rng=random.Random(0), prompts=long)
    (sample,) = TASKS["needle"].make(wanted)
    assert 740 <= long.count(sample.turns, sample.start) <= 800
    assert count_words(sample.turns[0]) < 500


def test_later_turns_begin_with_the_tokens_of_the_earlier_ones(chat):
    wanted = Wanted(tokens=400, depth=0.5, rng=random.Random(0), prompts=chat)
    asked = [
        chat.asked(sample.turns, sample.start)["prompt_token_ids"]
        for sample in TASKS["multi-turn"].make(wanted)
    ]
    assert len(asked) == 3
    for before, after in pairwise(asked):
        assert after[: len(before)] == before


class TestRefused:
    def test_no_template(self, tmp_path):
        model = write_tokenizer(tmp_path / "model", None)
        with pytest.raises(ValueError, match=r"expected one in the tokenizer of .*, found none"):
            ChatPrompts.load(str(model))

    def test_template_that_takes_no_conversation(self, tmp_path):
        refuse = (
            "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}"
        )
        model = write_tokenizer(tmp_path / "model", refuse + CHATML)
        with pytest.raises(ValueError, match=r"in turn, and an answer .* got: one message only"):
            ChatPrompts.load(str(model))

    def test_template_that_hides_the_answer(self, tmp_path):
        template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
        model = write_tokenizer(tmp_path / "model", template)
        with pytest.raises(ValueError, match="an answer that was begun, got: "):
            ChatPrompts.load(str(model))

    def test_suites_alone(self, tmp_path):
        model = write_tokenizer(tmp_path / "model", None)
        given = settings_of(model=str(model), suites=("gsm8k",), suites_chat=True)
        with pytest.raises(ValueError, match="--suites-chat out"):
            load_chat(given)


class TestWhatIsAsked:
    def test_off_by_default(self):
        assert isinstance(prompts_of(settings_of()), PlainPrompts)
        assert not settings_of(suites=("gsm8k",)).suites_job()["apply_chat_template"]

    def test_suites_alone_leave_the_tasks_plain(self):
        given = settings_of(suites=("gsm8k",), suites_chat=True)
        assert isinstance(prompts_of(given), PlainPrompts)

    def test_suites_are_asked_alike(self):
        given = settings_of(suites=("gsm8k",), apply_chat_template=True)
        assert given.suites_job()["apply_chat_template"]

    def test_the_engines_tokenizer_is_used(self, tmp_path):
        other = write_tokenizer(tmp_path / "other", CHATML)
        given = settings_of(apply_chat_template=True, engine={"tokenizer": str(other)})
        assert "<|im_start|>" in prompts_of(given).text(("a",), "b")

    @pytest.fixture
    def asked(self, monkeypatch, tmp_path):
        """Runs an evaluation of the needle model: (jobs by engine, results)."""

        def asked(model=MODEL, **given):
            jobs = {}

            def answers_of(name, job, folder):
                jobs[name] = job
                answers = [["" for _ in turn] for turn in job["rounds"]]
                return {"rounds": answers, "logprobs": [[-1.0] * 50 for _ in job["texts"]]}

            monkeypatch.setattr(module, "answers_of", answers_of)
            count_tokens, vocabulary = load_tokenizer(str(model))
            settings = settings_of(model=str(model), perplexity=True, **given)
            return jobs, evaluate(
                settings, tmp_path, count_tokens=count_tokens, vocabulary=vocabulary
            )

        return asked

    def test_both_sides_get_the_same_tokens(self, asked):
        jobs, _ = asked(apply_chat_template=True, tasks=("needle", "multi-turn"))
        assert jobs["full"]["rounds"] == jobs["duo-0.5"]["rounds"]
        questions = [q for turn in jobs["full"]["rounds"] for q in turn]
        assert all(q.keys() == {"prompt_token_ids", "max_tokens"} for q in questions)
        longest = max(len(q["prompt_token_ids"]) + q["max_tokens"] for q in questions)
        assert jobs["full"]["engine"]["max_model_len"] >= longest

    def test_perplexity_is_of_plain_text(self, asked):
        plain, _ = asked()
        templated, _ = asked(apply_chat_template=True)
        assert templated["full"]["texts"] == plain["full"]["texts"]
        assert all(isinstance(text, str) for text in templated["full"]["texts"])

    def test_a_template_that_adds_nothing_asks_the_same(self, asked):
        """The needle model's own only joins messages: what is asked is what plain text asks."""
        from tokenizers import Tokenizer

        encode = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode
        plain, _ = asked(tasks=("needle", "copying", "common-words"))
        templated, _ = asked(tasks=("needle", "copying", "common-words"), apply_chat_template=True)
        assert [q["prompt_token_ids"] for q in templated["full"]["rounds"][0]] == [
            encode(q["prompt"]).ids for q in plain["full"]["rounds"][0]
        ]

    def test_recorded_and_told(self, asked, tmp_path):
        _, plain = asked()
        _, own = asked(apply_chat_template=True)
        _, other = asked(
            model=copy_needle(tmp_path / "other", "Read. " + (MODEL / NEEDLES_OWN).read_text()),
            apply_chat_template=True,
        )
        assert plain["chat_template"] is None
        assert len({own["chat_template"], other["chat_template"]}) == 2
        assert own["settings"]["apply_chat_template"]
        assert not plain["settings"]["apply_chat_template"]
        told = f"through the model's chat template (SHA-256 {own['chat_template']}), texts for"
        assert told in printed(own)
        assert "chat template" not in printed(plain)
        (tmp_path / "results.json").write_text(json.dumps(own))
        page = render(load_results([tmp_path / "results.json"]))
        assert f"chat template (SHA-256 {own['chat_template']})" in page


def printed(results: dict) -> str:
    console = Console(width=200, file=StringIO())
    for table in tables(results):
        console.print(table)
    return console.file.getvalue()
