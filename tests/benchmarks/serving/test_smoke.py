"""``benchmarks.serve --smoke`` with vLLM itself."""

from __future__ import annotations

import json

import pytest

from benchmarks import serve
from vllm_duo.report.load import load_results
from vllm_duo.report.render import render
from vllm_duo.report.serve_results import ServeResults

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke") / "run"
    assert serve.main(["--smoke", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def results(folder):
    return ServeResults.model_validate_json((folder / "results.json").read_text())


def test_every_point_on_both_sides_with_right_answers(results):
    assert results.complete
    assert results.gate.passed
    assert results.gate.judges_passkeys
    for point in results.points:
        assert [side.side for side in point.sides] == ["stock", "duo-0.5"]
        for side in point.sides:
            assert (side.passkeys_right, side.passkeys_asked) == (2, 2)
            assert side.e2e_ms.samples == 10
            assert 0 < side.ttft_ms.median < side.e2e_ms.median


def test_figures_are_those_of_vllms_client(folder):
    files = list(folder.rglob("*-round0.json"))
    assert files
    for file in files:
        ours, told = (
            json.loads(file.read_text()),
            json.loads(file.with_suffix(".client.json").read_text()),
        )
        for kind, name in (("ttft", "ttft"), ("tpot", "tpot"), ("itl", "itl"), ("e2e", "e2el")):
            for quantile in ("p95", "p99"):
                expected = told[f"{quantile}_{name}_ms"]
                assert ours[f"{kind}_ms"][quantile] == pytest.approx(expected, rel=1e-6)
            assert ours[f"{kind}_ms"]["median"] == pytest.approx(told[f"median_{name}_ms"])


def test_shared_prefixes_hit_alike_on_both_sides(results):
    stock, duo = results.points[1].sides
    assert stock.prefix_hit_rate > 0.2
    assert duo.prefix_hit_rate == pytest.approx(stock.prefix_hit_rate, abs=0.1)


def test_duo_holds_more_in_the_same_pool(results):
    stock, duo = results.sides
    assert duo.kv_tokens > 1.5 * stock.kv_tokens


def test_report(folder):
    assert "Serving: " in render(load_results([folder]))
