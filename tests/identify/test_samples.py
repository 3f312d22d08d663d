"""Pass-key samples: spans, lengths, several keys, texts."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest

from tests.identify import tiny
from vllm_duo.identify.haystack import FileText, MadeText
from vllm_duo.identify.samples import Sample, SampleMaker, to_batch


@pytest.fixture(scope="module")
def words():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def maker(words):
    return SampleMaker(words, MadeText(), 0, (150, 200))


@pytest.mark.parametrize("keys", [1, 3])
@pytest.mark.parametrize("style", ["digits", "words"])
def test_spans_hold_keys_and_answers(maker, words, keys, style):
    sample = replace(maker, keys=keys, key_style=style, key_length=4).make("a", 0)

    def read(span):
        return words.decode(sample.ids[span[0] : span[1]]).strip()

    found = [read(span) for span in sample.keys]
    assert found == [read(span) for span in sample.needle_keys]
    assert [f"{key}." for key in found] == [read(span) for span in sample.answers]
    assert len(set(found)) == keys
    for key, needle, ordinal in zip(
        found, sample.needles, ("first", "second", "third"), strict=False
    ):
        label = "" if keys == 1 else f"{ordinal} "
        assert read(needle) == f"The {label}pass key is {key}."
        assert len(key) == 4 if style == "digits" else len(key.split()) == 4


def test_predicting_positions_come_one_before_the_tokens(maker, words):
    sample = maker.make("a", 0)
    following = [sample.ids[row + 1] for row in sample.key_queries()]
    assert (
        words.decode(following).strip() == words.decode(sample.ids[slice(*sample.keys[0])]).strip()
    )
    assert set(sample.key_queries()) < set(sample.answer_queries())


def test_lengths_spread_over_their_range(maker):
    lengths = [len(maker.make("a", number).ids) for number in range(40)]
    assert 130 <= min(lengths) < 160
    assert 185 < max(lengths) <= 200


def test_sample_depends_on_seed_purpose_and_number_alone(maker):
    sample = maker.make("a", 3)
    assert maker.make("a", 3) == sample
    others = (maker.make("a", 4), maker.make("b", 3), replace(maker, seed=1).make("a", 3))
    assert all(other.ids != sample.ids for other in others)


def test_hidden_samples_follow_the_rule(maker):
    samples = maker.make_hidden("check", 10, 16, 40)
    assert len(samples) == 10
    for sample in samples:
        (first, end), (asked, _) = sample.needle_keys[0], sample.keys[0]
        query = asked - 1  # the first of the answer; later ones see no more of the key
        assert not [j for j in range(first, end) if j < 16 or j > query - 40]


@pytest.mark.parametrize(
    ("first", "end", "hidden"),
    # The answer begins at 100, its query at 99: with 40 recent tokens it sees 60 and later.
    [(16, 21, True), (15, 20, False), (55, 60, True), (56, 61, False)],
)
def test_hidden_is_exact_at_both_ends(first, end, hidden):
    sample = Sample(
        (0,) * 120, ((100, 106),), ((100, 105),), ((first - 4, end + 1),), ((first, end),)
    )
    assert sample.hidden(16, 40) is hidden


def test_samples_too_short_to_hide_a_key_are_refused(maker):
    with pytest.raises(ValueError, match="raise the lengths"):
        maker.make_hidden("check", 1, 100, 100)


def test_keys_that_do_not_fit_are_refused(maker):
    with pytest.raises(ValueError, match=r"take \d+ tokens .* the sample has"):
        replace(maker, keys=20).make("a", 0)


def test_text_file_is_the_haystack(words, tmp_path):
    file = tmp_path / "text.txt"
    lines = [f"Anna went to market {word}." for word in ("one", "two", "three", "four")]
    file.write_text("\n\n".join(lines * 8))
    text = FileText(file, words, 100)
    import random

    sentences = list(islice(text.sentences(random.Random(0)), 5))
    start = lines.index(sentences[0])
    assert sentences == [lines[(start + n) % 4] for n in range(5)]
    sample = SampleMaker(words, text, 0, (90, 100)).make("a", 0)
    assert "went to market" in words.decode(sample.ids)


@pytest.mark.parametrize(
    ("repeats", "message"),
    [
        (1, r"at least 1000 tokens.*found 6: give a longer text$"),
        (80, r"or lower --max-length to \d+$"),
    ],
)
def test_text_that_is_too_short_says_what_it_has(words, tmp_path, repeats, message):
    file = tmp_path / "text.txt"
    file.write_text("Anna went to the market. " * repeats)
    with pytest.raises(ValueError, match=message):
        FileText(file, words, 1000)


def test_text_that_cannot_be_read_is_named(words, tmp_path):
    with pytest.raises(ValueError, match=r"missing\.txt"):
        FileText(tmp_path / "missing.txt", words, 100)


def test_batches_are_padded_at_their_end(maker):
    samples = [maker.make("a", number) for number in range(3)]
    ids, answers = to_batch(samples)
    for row, sample in enumerate(samples):
        assert ids[row, : len(sample.ids)].tolist() == list(sample.ids)
        assert not ids[row, len(sample.ids) :].any()
        assert answers[row].nonzero().flatten().tolist() == sample.answer_queries()
