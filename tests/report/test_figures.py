"""Figures as files: each of the page's, by itself, in colours of its own."""

from __future__ import annotations

import dataclasses
import struct
import sys
from xml.etree import ElementTree

import pytest

from tests.cli_run import run  # noqa: F401 - a fixture
from vllm_duo.report import figures
from vllm_duo.report.figures import standalone, write_figures
from vllm_duo.report.load import load_results
from vllm_duo.report.render import sections_of

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def sections(runs):
    return sections_of(load_results(runs))


@pytest.fixture
def files(sections, tmp_path):
    return write_figures(sections, tmp_path / "figures")


def test_every_chart_and_heatmap_of_the_page_is_written(files, sections):
    blocks = [block for section in sections for block in section.blocks]
    charts = sum(bool(block.chart) for block in blocks)
    heatmaps = sum(any(cell.colour for row in block.rows for cell in row) for block in blocks)
    assert charts == 7  # pattern, plan, perplexity at two sparsities, serving's bars and two curves
    assert heatmaps == 6  # two tasks: full attention and two sparsities each
    assert len(files) == charts + heatmaps
    assert files[0].name.startswith("01-values-by-layer")
    assert len({file.name for file in files}) == len(files)


def test_files_need_nothing_of_the_page(files):
    for file in files:
        text = file.read_text()
        root = ElementTree.fromstring(text)
        assert root.tag == f"{SVG}svg"
        assert float(root.get("width")) > float(root.get("height")) * 0.5 > 0
        assert "var(" not in text
        assert root.findtext(f"{SVG}title")
        back = root.find(f"{SVG}rect")
        assert back.get("fill") == "#ffffff"
        assert list(root).index(back) < min(
            list(root).index(part) for part in root if part.tag in {f"{SVG}text", f"{SVG}line"}
        )


def test_heatmap_tells_the_tables_figures(files, sections):
    (block,) = (
        b
        for s in sections
        for b in s.blocks
        if b.title == "copying by depth and length, 50% streaming"
    )
    (file,) = (file for file in files if "copying-by-depth-and-length-50-streaming" in file.name)
    words = [text.text for text in ElementTree.parse(file).iter(f"{SVG}text")]
    for row in block.rows:
        for cell in row:
            assert cell.text in words
    assert set(block.columns[1:]) <= set(words)


def test_png(sections, tmp_path):
    pytest.importorskip("vl_convert", reason="PNG figures need vl-convert-python")
    files = write_figures(sections[:1], tmp_path / "figures", ("svg", "png"))
    svg, png = files
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    root = ElementTree.parse(svg).getroot()
    assert (width, height) == (3 * int(root.get("width")), 3 * int(root.get("height")))
    without_text = ElementTree.parse(svg).getroot()
    for text in without_text.findall(f"{SVG}text"):
        without_text.remove(text)
    bare = figures._png(ElementTree.tostring(without_text, encoding="unicode"))
    assert len(png.read_bytes()) > 1.05 * len(bare), "the text is drawn, too"


def test_png_without_its_library(sections, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(RuntimeError, match="PNG figures need vl-convert-python"):
        write_figures(sections, tmp_path / "figures", ("svg", "png"))
    assert not (tmp_path / "figures").exists()


def test_other_kinds(sections, tmp_path):
    with pytest.raises(ValueError, match="figures as gif: expected svg or png"):
        write_figures(sections, tmp_path / "figures", ("svg", "gif"))


def test_nothing_to_draw(sections, tmp_path):
    (table,) = (b for b in sections[0].blocks if not b.chart)
    bare = [dataclasses.replace(sections[0], blocks=[table])]
    with pytest.raises(ValueError, match="these results have nothing to draw"):
        write_figures(bare, tmp_path / "figures")


def test_a_chart_without_a_title_stands_alone_too():
    root = ElementTree.fromstring(standalone('<svg viewBox="0 0 4 2"><line class="grid"/></svg>'))
    assert [part.tag.removeprefix(SVG) for part in root] == ["style", "rect", "line"]


def test_command(run, runs, tmp_path):  # noqa: F811
    folder = tmp_path / "figures"
    page = tmp_path / "page.html"
    given = ["report", *map(str, runs), "--out", str(page), "--figures", str(folder)]
    code, out, _ = run(*given)
    assert code == 0
    assert "Saved 13 figures to" in out
    assert len(list(folder.glob("*.svg"))) == 13
    code, _, errors = run(*given, "--figure-kinds", "jpeg")
    assert code == 2
    assert "figures as jpeg: expected svg or png: change --figure-kinds" in errors
