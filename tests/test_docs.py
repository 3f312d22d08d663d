"""The documentation: it builds without a warning, and says what is true."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.published import published_layout
from tests.server.refused import REFUSED_MODELS, REFUSED_SETTINGS
from vllm_duo.compat.scheduler_stats import COUNTERS
from vllm_duo.heads.discovery import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def build(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--site-dir",
            str(folder),
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("material") is None
    or importlib.util.find_spec("mkdocstrings") is None,
    reason="mkdocs-material or mkdocstrings is not installed: pip install '.[docs]'",
)


@needs_mkdocs
class TestSite:
    @pytest.fixture(scope="class")
    def site(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("site")
        done = build(folder)
        assert done.returncode == 0, done.stderr
        assert "WARNING" not in done.stderr
        return folder

    def test_every_page_is_built(self, site):
        built = {page.stem for page in site.glob("*.html")} - {"404"}
        assert built == {page.stem for page in DOCS.glob("*.md")}

    def test_api_has_docstrings(self, site):
        text = (site / "api.html").read_text()
        assert "near 0 it streams without loss" in text  # HeadPattern's
        assert text.count("doc-section-title") > 10

    def test_nothing_is_loaded_from_elsewhere(self, site):
        for page in site.glob("*.html"):
            loaded = re.findall(
                r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text()
            )
            assert not loaded, page.name

    @pytest.mark.parametrize("link", ["no-such-page.md", "design.md#no-such-heading"])
    def test_a_broken_link_fails(self, link, tmp_path):
        """A site of two pages with our own settings."""
        docs = tmp_path / "docs"
        docs.mkdir()
        (docs / "index.md").write_text(f"# Home\n\n[broken]({link})\n")
        (docs / "design.md").write_text("# Design\n")
        config = (ROOT / "mkdocs.yml").read_text()
        head, rest = config.split("\nnav:\n")
        settings = rest[rest.index("\nvalidation:") : rest.index("\nplugins:")]
        (tmp_path / "mkdocs.yml").write_text(f"{head}\n{settings}\n")
        done = build(tmp_path / "site", "-f", str(tmp_path / "mkdocs.yml"))
        assert done.returncode != 0
        assert link.split("#")[-1] in done.stderr


def test_table_of_what_a_sparsity_saves():
    lengths = (1024, 4096, 32768, 131072)
    text = (DOCS / "sparsity.md").read_text()
    patterns = [folder for folder in PUBLISHED.iterdir() if folder.is_dir()]
    assert len(patterns) == 4
    for folder in patterns:
        for sparsity in (0.25, 0.5, 0.75):
            layout = published_layout(folder.name, sparsity)
            times = [layout.full_attention_bytes(n) / layout.held_bytes(n) for n in lengths]
            cells = " | ".join(f"{each:.2f} x" for each in times)
            assert f"| {100 * sparsity:.0f} % | {cells} |" in text, folder.name


def test_table_of_what_ranks_cost():
    text = (DOCS / "scale.md").read_text()
    for folder in PUBLISHED.iterdir():
        if folder.is_dir():
            layouts = [published_layout(folder.name, ranks=ranks) for ranks in (1, 2, 4, 8)]
            layouts.append(published_layout(folder.name, ranks=8, balance=True))
            layouts.append(published_layout(folder.name, stages=2))
            layouts.append(published_layout(folder.name, ranks=8, stages=2, balance=True))
            cells = " | ".join(f"{layout.times_stock(32_768):.2f} x" for layout in layouts)
            assert f"| {folder.name} | {cells} |" in text


def test_every_metric_has_its_row():
    told = set(re.findall(r"^\| `(vllm_duo:\w+)` \|", (DOCS / "operating.md").read_text(), re.M))
    source = (ROOT / "vllm_duo" / "metrics.py").read_text()
    gauges = {f"vllm_duo:{name}" for name in re.findall(r'f"\{PREFIX\}(\w+)",', source)}
    assert len(gauges) == 6
    assert told == gauges | {f"vllm_duo:{name}_total" for name in COUNTERS}


def test_the_design_names_every_patch():
    text = (DOCS / "design.md").read_text()
    patches = [file.stem for file in (ROOT / "vllm_duo" / "compat").glob("[a-z]*.py")]
    assert len(patches) > 10
    assert [name for name in patches if f"`{name}`" not in text] == []


def refusals() -> dict[str, str]:
    """Every reason that the tests of refusals know, without its figures and names."""
    reasons = [reason for _, *reasons in REFUSED_MODELS.values() for reason in reasons]
    reasons += [reason for reason, _ in REFUSED_SETTINGS.values()]
    return {
        reason: re.split(r" \(\{|: | \d| \(--| (?=fp8|nvfp4|bfloat16)", reason)[0]
        for reason in reasons
    }


@pytest.mark.parametrize("reason", refusals().values(), ids=refusals())
def test_every_refusal_has_a_remedy(reason):
    lines = [line for line in (DOCS / "failures.md").read_text().splitlines() if line[:1] == "|"]
    assert any(reason.split(" (")[0] in line.split(" | ")[0] for line in lines), reason


def test_picture_is_readable_in_both_themes():
    file = DOCS / "assets" / "memory.svg"
    picture = ElementTree.parse(file).getroot()
    assert picture.get("viewBox")
    assert picture.find("{*}title").text
    text = file.read_text()
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    used = set(re.findall(r'class="([\w ]+)"', text))
    styled = set(re.findall(r"\.(\w+) \{", light))
    assert used <= styled
    # What is filled with a colour has one for dark panels too.
    assert {"panel", "text", "soft", "ret", "sink", "rec"} <= set(re.findall(r"\.(\w+) \{", dark))


@pytest.mark.parametrize(
    "page", ["README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in DOCS.glob("*.md"))]
)
def test_files_that_a_page_names_exist(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    named = re.findall(
        r"`((?:vllm_duo|tests|docs|docker|benchmarks|tools|csrc|models)/[\w./-]+\.\w+)[`:]", text
    )
    named += [link for link in re.findall(r"\]\(((?:docs/)[\w./-]+)", text) if page == "README.md"]
    assert [name for name in named if not (ROOT / name).exists()] == []
