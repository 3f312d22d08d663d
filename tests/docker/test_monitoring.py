"""Prometheus rules and the Grafana dashboard ask for what the server in fact exports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import promql_parser
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
NEEDLE = ROOT / "models" / "needle"
DASHBOARD = json.loads((DOCKER / "grafana" / "dashboards" / "vllm-duo.json").read_text())
ALERTS = yaml.safe_load((DOCKER / "prometheus" / "alerts.yml").read_text())
SCRAPE = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
# Prometheus' own: the sample of every scrape, and the labels that it adds.
BUILT_IN = {"up": {"job", "instance"}}
ADDED = {"instance", "job"}

EXPRESSIONS = {rule["alert"]: rule["expr"] for rule in RULES} | {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in PANELS
    for target in panel["targets"]
}


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Labels of every sample that the loggers of a duo server make, by its name on /metrics."""
    from prometheus_client import REGISTRY
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    from vllm_duo.metrics import DuoStatLogger

    config = EngineArgs(
        model=str(NEEDLE), attention_backend="duo", dtype="float32"
    ).create_engine_config()
    loggers = [DuoStatLogger(config), PrometheusStatLogger(config, [0])]
    assert loggers
    samples = {}
    for family in REGISTRY.collect():
        # Python's and the process's own metrics have no labels that are looked up here.
        collector = REGISTRY._names_to_collectors[family.name]
        labels = set(getattr(collector, "_labelnames", ()))
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        for ending in endings.get(family.type, ("",)):
            samples[family.name + ending] = labels | ({"le"} if ending == "_bucket" else set())
    return samples


def parse(expression: str) -> promql_parser.Expr:
    # Grafana puts a duration there.
    return promql_parser.parse(expression.replace("$__rate_interval", "5m"))


def nodes(expression: str) -> list[promql_parser.Expr]:
    found: list[promql_parser.Expr] = []
    promql_parser.walk(parse(expression), found.append)
    return found


def selectors(expression: str) -> Iterator[promql_parser.VectorSelector]:
    return (node for node in nodes(expression) if isinstance(node, promql_parser.VectorSelector))


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
class TestExpression:
    def test_its_metrics_are_exported_with_its_labels(self, expression, exported):
        known = exported | BUILT_IN
        used = list(selectors(expression))
        assert used
        for selector in used:
            assert selector.name in known, selector.name
            matched = {matcher.name for matcher in selector.matchers.matchers}
            assert matched <= known[selector.name] | ADDED, selector.name

    def test_it_groups_by_labels_that_are_there(self, expression, exported):
        labels = set.intersection(
            *((exported | BUILT_IN)[each.name] for each in selectors(expression))
        )
        for node in nodes(expression):
            modifier = getattr(node, "modifier", None)
            named = getattr(modifier, "labels", None) or getattr(
                getattr(modifier, "matching", None), "labels", []
            )
            assert set(named) <= labels | ADDED, node.prettify()

    def test_a_counter_is_asked_for_its_rate(self, expression):
        """A bare counter only says how long a server has been up."""
        text = parse(expression).prettify().replace("\n", "").replace(" ", "")
        for selector in selectors(expression):
            if selector.name.endswith(("_total", "_bucket")):
                assert f"rate({selector.name}" in text


def test_an_unknown_metric_would_be_found(exported):
    assert "vllm_duo:held_block" not in exported
    assert "vllm:gpu_cache_usage_perc" not in exported  # its name in older vLLM
    assert exported["vllm_duo:held_blocks"] == {"engine", "class"}
    assert "vllm:request_time_per_output_token_seconds_bucket" in exported


class TestRules:
    @pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
    def test_is_whole(self, rule):
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert promql_parser.parse_duration(rule["for"]).total_seconds() >= 60
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"]["summary"]

    def test_every_one_is_explained(self):
        text = (ROOT / "docs" / "operating.md").read_text()
        told = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `VllmDuo")}
        assert told == {rule["alert"] for rule in RULES}

    def test_prometheus_reads_them_and_scrapes_the_server(self):
        assert SCRAPE["rule_files"] == ["alerts.yml"]
        (job,) = SCRAPE["scrape_configs"]
        (down,) = [rule for rule in RULES if rule["alert"] == "VllmDuoDown"]
        assert f'job="{job["job_name"]}"' in down["expr"]
        assert job["static_configs"] == [{"targets": ["server:8000"]}]


class TestDashboard:
    def test_panels_do_not_overlap(self):
        taken = {}
        for panel in DASHBOARD["panels"]:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    assert (x, y) not in taken, (panel["title"], taken[x, y])
                    taken[x, y] = panel["title"]

    def test_ids_are_unique(self):
        ids = [panel["id"] for panel in DASHBOARD["panels"]]
        assert len(ids) == len(set(ids))

    def test_it_uses_the_provisioned_data_source(self):
        folder = DOCKER / "grafana" / "provisioning"
        (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())[
            "datasources"
        ]
        used = {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]}
        assert used == {source["uid"]}
        assert source["url"] == "http://prometheus:9090"

    def test_every_metric_of_ours_is_shown(self, exported):
        asked = {each.name for expression in EXPRESSIONS.values() for each in selectors(expression)}
        assert {name for name in exported if name.startswith("vllm_duo:")} <= asked

    def test_the_server_can_be_chosen(self):
        (variable,) = DASHBOARD["templating"]["list"]
        for panel in PANELS:
            for target in panel["targets"]:
                for selector in selectors(target["expr"]):
                    matchers = [str(each.value) for each in selector.matchers.matchers]
                    assert matchers == [f"${variable['name']}"], target["expr"]
