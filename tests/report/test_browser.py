"""The page in a browser: drawn without errors, on a phone, in the dark, by keyboard."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from vllm_duo.report.load import load_results
from vllm_duo.report.render import render

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs a Chromium on the PATH")

PHONE = {"width": 390, "height": 844}
FOCUSABLE = "a[href], .scroll, summary"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        offline = ["--disable-gpu", "--disable-background-networking", "--no-first-run"]
        alone = ["--no-sandbox"] if os.geteuid() == 0 else []
        started = playwright.chromium.launch(executable_path=BROWSER, args=offline + alone)
        yield started
        started.close()


@pytest.fixture
def open_page(browser, runs, tmp_path):
    """Opens the page of one result of each kind; (page, what the browser complained of)."""
    file = tmp_path / "report.html"
    contexts = []

    def open_page(**settings):
        file.write_text(render(load_results(runs)), encoding="utf-8")
        contexts.append(browser.new_context(**settings))
        page, complaints = contexts[-1].new_page(), []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url))
        page.goto(file.as_uri())
        return page, complaints

    yield open_page
    for context in contexts:
        context.close()


def test_every_chart_is_drawn_without_a_complaint(open_page):
    page, complaints = open_page()
    assert complaints == []
    charts = page.locator("svg.chart")
    assert charts.count() == 7
    for index in range(charts.count()):
        box = charts.nth(index).bounding_box()
        assert box["width"] > 300
        assert box["height"] > 60
        for part in charts.nth(index).locator("polyline, circle, rect, text").all():
            inner = part.bounding_box()
            assert inner is not None, "it has no size"
            assert box["x"] - 1 <= inner["x"]
            assert inner["x"] + inner["width"] <= box["x"] + box["width"] + 1
            assert box["y"] - 1 <= inner["y"] <= box["y"] + box["height"]


def test_nothing_runs_off_a_phone(open_page, plan_file):
    plan = json.loads(plan_file.read_text())
    plan["settings"]["model"] = "/a/" + "very-long-name-of-a-model" * 6
    plan_file.write_text(json.dumps(plan))
    page, _ = open_page(viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    for scroller in page.locator(".scroll").all():
        box = scroller.bounding_box()
        assert box["x"] + box["width"] <= PHONE["width"]


def contrast(first: str, second: str) -> float:
    """WCAG's ratio of two colours as a browser writes them: rgb(r, g, b)."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[4:-1].split(",")]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted(map(luminance, (first, second)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out(open_page, scheme):
    page, _ = open_page(color_scheme=scheme)

    def style(selector, name):
        script = f"element => getComputedStyle(element)[{name!r}]"
        return page.locator(selector).first.evaluate(script)

    back = style("body", "backgroundColor")
    assert (contrast(back, "rgb(0, 0, 0)") > 10) == (scheme == "light")
    assert contrast(back, style("body", "color")) >= 7
    assert contrast(back, style("svg text", "fill")) >= 7
    for line in ("duo", "full"):
        assert contrast(back, style(f"polyline.{line}", "stroke")) >= 3
    assert contrast(style("td.cell", "color"), style("td.cell", "backgroundColor")) >= 4.5


def test_the_keyboard_reaches_links_tables_and_settings(open_page):
    page, _ = open_page()
    expected = page.locator(FOCUSABLE).count()
    reached = []
    for _ in range(expected):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                f"[...document.querySelectorAll({FOCUSABLE!r})].indexOf(document.activeElement)"
            )
        )
    assert reached == list(range(expected))
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details[open]").count() == 1
