"""The report: one file that needs nothing else, with every figure of the results."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from tests.cli_run import run  # noqa: F401 - a fixture
from vllm_duo import HeadPattern
from vllm_duo.report.chart import Series, line_chart
from vllm_duo.report.grid import GridCell, grid_chart
from vllm_duo.report.load import load_results
from vllm_duo.report.pattern import name_of
from vllm_duo.report.render import render

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags close as they open, and collects what the page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.addresses += [found[key] for key in ("src", "href") if key in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


class TestPage:
    @pytest.fixture
    def text(self, plan_file, eval_folder):
        return render(load_results([plan_file, eval_folder]))

    def test_is_well_formed_and_needs_nothing_else(self, text):
        page = Page(text)
        assert {address[0] for address in page.addresses} == {"#"}
        assert [address[1:] for address in page.addresses] == page.ids
        assert "script" not in page.tags
        assert "url(" not in text
        assert "@import" not in text

    def test_shows_every_verdict_and_the_capacity(self, text):
        words = Page(text).words
        assert "lost 100.0 points" in words
        assert "within noise; a loss of more than" in words
        assert "not at 100 tokens: this task needs at least" in words
        assert "19.76" in words  # 5,119 blocks / 259, as in tests/planning
        assert '"kv_cache_bytes": 42949672960' in words

    def test_draws_capacity_and_perplexity(self, text):
        charts = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
        assert len(charts) == 3  # one plan, perplexity at two sparsities
        for chart in charts:
            assert len(ElementTree.fromstring(chart).findall("polyline")) == 2

    def test_heatmap_has_a_cell_for_each_depth_and_length(self, text):
        rows = re.findall(r'<td class="cell" style="background: rgb\([\d, ]+\)">(\d+)%</td>', text)
        sides, depths, lengths = 3, 5, 2  # full attention and two sparsities
        # The copying task fits 400 tokens only.
        assert len(rows) == sides * depths * (lengths + 1)

    def test_readable_in_the_dark_on_a_phone_and_by_keyboard(self, text):
        assert "prefers-color-scheme: dark" in text
        assert 'name="viewport"' in text
        assert text.count('class="scroll" tabindex="0"') == text.count("<table>")

    def test_names_are_escaped(self, plan_file):
        data = json.loads(plan_file.read_text())
        data["settings"]["model"] = "<script>alert(1)</script>"
        plan_file.write_text(json.dumps(data))
        assert "<script" not in render(load_results([plan_file]))

    def test_pool_that_holds_nothing_has_no_chart(self, plan_file):
        data = json.loads(plan_file.read_text())
        for length in data["full"]["by_length"]:
            length["concurrent_requests"] = 0.0
        plan_file.write_text(json.dumps(data))
        assert "<svg" not in render(load_results([plan_file]))


class TestPattern:
    def test_every_head_has_its_cell_and_kept_ones_a_dot(self, pattern_folder):
        page = render(load_results([pattern_folder]))
        (chart,) = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
        root = ElementTree.fromstring(chart)
        told = [rect.findtext("title") for rect in root.findall("rect")]
        pattern = HeadPattern.load(pattern_folder)
        assert told[0] == f"layer 0, KV head 0: {pattern.values[0, 0]:.3f}"
        assert len(told) == pattern.values.size + 6  # and the legend
        dots = len(root.findall("circle"))
        assert dots == pattern.select(sparsity=0.5).retrieval.sum()

    def test_selections_can_be_told_by_their_hashes(self, pattern_folder):
        words = Page(render(load_results([pattern_folder]))).words
        for sparsity in (0.25, 0.5, 0.75):
            assert HeadPattern.load(pattern_folder).select(sparsity=sparsity).mask_hash in words
        assert '"deploy_sink_size": 16' in words

    def test_a_models_own_pattern_has_the_models_name(self, tmp_path):
        assert name_of(tmp_path / "Some-Model" / "duo_pattern") == "Some-Model"
        assert name_of(tmp_path / "mine") == "mine"

    def test_a_broken_table_is_refused(self, pattern_folder):
        (pattern_folder / "full_attention_heads.tsv").write_text("1.0\tno\n")
        with pytest.raises(ValueError, match="line 1, column 2: expected a number, got 'no'"):
            render(load_results([pattern_folder]))


class TestGrid:
    def chart(self, columns, **settings):
        cells = [[GridCell(colour="rgb(1,2,3)", text=str(c)) for c in range(columns)]]
        names = [str(c) for c in range(columns)]
        return ElementTree.fromstring(grid_chart("t", ["row"], names, cells, **settings))

    @pytest.mark.parametrize("columns", [1, 8, 32, 128])
    def test_cells_stand_side_by_side_within_the_picture(self, columns):
        cells = [
            (float(r.get("x")), float(r.get("width"))) for r in self.chart(columns).iter("rect")
        ]
        for (x, width), (following, _) in pairwise(cells):
            assert x + width == pytest.approx(following, abs=0.11)
        assert cells[-1][0] + cells[-1][1] <= 640

    def test_names_do_not_run_into_each_other(self):
        above = [float(t.get("x")) for t in self.chart(128).iter("text") if t.get("y") == "20.0"]
        assert 2 < len(above) < 128
        assert min(b - a for a, b in pairwise(above)) >= 20

    def test_other_numbers_of_cells(self):
        with pytest.raises(ValueError, match="chart 't': expected 2 rows of 1 cells"):
            grid_chart("t", ["a", "b"], ["c"], [[GridCell()]])


class TestChart:
    def points(self, values, **settings) -> list[float]:
        line = Series(name="duo", values=values, style="duo")
        svg = line_chart("title", [str(v) for v in values], [line], **settings)
        (found,) = ElementTree.fromstring(svg).findall("polyline")
        return [float(point.split(",")[1]) for point in found.get("points").split()]

    def test_higher_values_stand_higher(self):
        low, middle, high = self.points([1.0, 2.0, 3.0])
        assert low - middle == pytest.approx(middle - high, abs=0.2)
        assert high < middle < low

    def test_logarithmic_axis(self):
        low, middle, high = self.points([1.0, 10.0, 100.0], log=True)
        assert low - middle == pytest.approx(middle - high, abs=0.2)

    def test_one_value_only(self):
        assert len(self.points([5.0, 5.0])) == 2

    @pytest.mark.parametrize(
        ("values", "log"), [([], False), ([0.0], True), ([float("nan")], False)]
    )
    def test_bad_values(self, values, log):
        with pytest.raises(ValueError, match="chart 'title': expected"):
            self.points(values, log=log)


class TestCommand:
    def test_writes_the_page(self, run, plan_file, tmp_path):  # noqa: F811
        out = tmp_path / "page.html"
        assert run("report", str(plan_file), "--out", str(out))[0] == 0
        assert "Plan:" in Page(out.read_text()).words

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.json", "{", "expected JSON, got text that does not parse"),
            ("a.json", "[]", "got another JSON document"),
            ("a.json", '{"schema_version": 1}', "got another JSON document"),
            ("folder/other.json", "{}", "found 1 JSON files, none of them results"),
            ("folder/read.me", "", "found 0 JSON files, none of them results"),
        ],
    )
    def test_bad_input(self, run, tmp_path, name, text, message):  # noqa: F811
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        target = tmp_path / name.split("/")[0]
        code, _, stderr = run("report", str(target), "--out", str(tmp_path / "page.html"))
        assert code == 2
        assert message in stderr
        assert not (tmp_path / "page.html").exists()

    def test_nothing_there(self, run, tmp_path):  # noqa: F811
        code, _, stderr = run("report", str(tmp_path / "none"))
        assert code == 2
        assert "expected a file or folder of results, found nothing" in stderr
