"""The report of a serving benchmark: curves, bars and the table."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from vllm_duo.report.bars import Bar, bar_chart
from vllm_duo.report.curve import Curve, curve_chart
from vllm_duo.report.load import Result
from vllm_duo.report.render import render

PARSED = ElementTree.fromstring


@pytest.fixture
def data(serve_data):
    return serve_data


def page(data):
    return render([Result(file=Path("results.json"), kind="serve", data=data)])


def test_table_has_every_figure(data):
    text = page(data)
    for words in (
        "60.0 [59.0, 61.0]",
        "2.00 [1.00, 3.00]",
        "15.0 / 30.0 / 45.0",
        "50.0%",
        "3 of 4",
        "Some CPU",
    ):
        assert words in text


def test_capacity_and_two_latencies_are_drawn(data):
    text = page(data)
    assert text.count("<svg") == 3
    assert "1,900 (1.90 x)" in text


def test_curves_go_from_low_to_high_load(data):
    svg = PARSED(
        next(part for part in page(data).split("<figure>") if "polyline" in part)
        .partition("</figcaption>")[2]
        .partition("</figure>")[0]
    )
    stock, duo = svg.findall("polyline")
    for line in (stock, duo):
        xs = [float(at.split(",")[0]) for at in line.get("points").split()]
        assert xs == sorted(xs)
    dots = [dot.find("title").text for dot in svg.findall("circle")]
    assert dots[0] == "stock, 1 in flight: 10, 5"
    assert dots[-1] == "duo-0.5, 8 in flight: 60, 15"


def test_incomplete_and_unjudged_runs_say_so(data):
    data["complete"] = False
    data["gate"]["judges_passkeys"] = False
    text = page(data)
    assert "The benchmark is not complete" in text
    assert "Pass keys are not judged" in text


def test_unfinished_and_other_versions_are_refused(data):
    with pytest.raises(ValueError, match=r"expected results of benchmarks\.serve, got others"):
        page(data | {"more": 1})
    with pytest.raises(ValueError, match=r"found none \(no run was finished\)"):
        page(data | {"points": []})


class TestBars:
    def test_lengths_are_in_proportion(self):
        bars = [Bar(name=str(v), value=v, style="duo") for v in (1.0, 4.0)]
        short, long = (float(r.get("width")) for r in PARSED(bar_chart("t", bars)).findall("rect"))
        assert long == pytest.approx(4 * short, rel=1e-3)

    @pytest.mark.parametrize("values", [[], [0.0], [float("inf")]])
    def test_bad_values(self, values):
        with pytest.raises(ValueError, match="expected bars of numbers above 0"):
            bar_chart("t", [Bar(name="a", value=value, style="duo") for value in values])


class TestCurve:
    def places(self, *points):
        chart = curve_chart("t", "x", [Curve(name="a", style="duo", points=points)])
        line = PARSED(chart).find("polyline").get("points")
        return [tuple(map(float, at.split(","))) for at in line.split()]

    def test_both_axes_begin_at_zero(self):
        (x0, y0), (x1, y1), (x2, y2) = self.places((0, 0, ""), (1, 1, ""), (2, 2, ""))
        assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
        assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
        assert x0 < x1
        assert y1 < y0

    @pytest.mark.parametrize("points", [[], [(1.0, -1.0, "")], [(float("nan"), 1.0, "")]])
    def test_bad_points(self, points):
        with pytest.raises(ValueError, match="expected points of numbers from 0 up"):
            self.places(*points)
