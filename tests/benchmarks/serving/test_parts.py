"""Settings, order of the runs, the gate's comparison, metrics and quantiles."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.serving.api import Answer
from benchmarks.serving.arguments import make_points, parse
from benchmarks.serving.client import Load, client_arguments
from benchmarks.serving.gate import first_difference
from benchmarks.serving.metrics import capacity, counts, read_sample
from benchmarks.serving.presets import PRESETS, make_dummy_model
from benchmarks.serving.run import Task, order
from benchmarks.serving.screen import time_left_s
from benchmarks.serving.settings import Point, Settings
from benchmarks.serving.summary import quantiles, samples_ms
from vllm_duo import HeadPattern

POINTS = tuple(
    Point(workload="random", prompt_tokens=n, output_tokens=4, requests=4, concurrency=2)
    for n in (64, 128)
)


def settings(**given):
    return Settings(**{"model": "m", "points": POINTS, "rounds": 2, **given})


class TestOrder:
    def test_resident_servers_alternate_at_every_point(self):
        tasks = order(settings(), resident=True)
        assert [(t.round, t.point.prompt_tokens, t.side) for t in tasks] == [
            (0, 64, "stock"),
            (0, 64, "duo-0.5"),
            (0, 128, "stock"),
            (0, 128, "duo-0.5"),
            (1, 64, "duo-0.5"),
            (1, 64, "stock"),
            (1, 128, "duo-0.5"),
            (1, 128, "stock"),
        ]

    def test_in_turn_each_is_started_once_a_round(self):
        sides = [task.side for task in order(settings(), resident=False)]
        assert sides == ["stock"] * 2 + ["duo-0.5"] * 4 + ["stock"] * 2


class TestServeArguments:
    def test_sides_differ_in_the_backend_only(self):
        given = settings(pattern="p", enforce_eager=True, server_args=("--dtype", "float32"))
        stock, duo = given.serve_arguments("stock"), given.serve_arguments("duo-0.5")
        assert duo[: len(stock)] == stock
        assert duo[len(stock) : -1] == ["--attention-backend", "duo", "--additional-config"]
        assert json.loads(duo[-1]) == {"duo": {"sparsity": 0.5, "pattern": "p"}}
        assert {"--enforce-eager", "float32"} <= set(stock)


class TestPoints:
    def test_every_workload_length_and_load(self):
        points = make_points(
            {
                "workloads": ["random", "multi-turn"],
                "lengths": [64, 128],
                "requests": [8, 4],
                "rates": [2.0],
                "concurrencies": [1],
            }
        )
        assert [(p.workload, p.prompt_tokens, p.requests, p.load) for p in points] == [
            ("random", 64, 8, "2/s"),
            ("random", 64, 8, "1 in flight"),
            ("random", 128, 4, "2/s"),
            ("random", 128, 4, "1 in flight"),
            ("multi-turn", 64, 8, "1 in flight"),
            ("multi-turn", 128, 4, "1 in flight"),
        ]

    def test_rates_alone_leave_the_closed_loop_out(self):
        assert [p.load for p in make_points({"rates": [1.0]})] == ["1/s"]

    def test_flags_change_a_preset(self):
        command = parse(["--smoke", "--rounds", "2", "--env", "A=b", "--out", "x"])
        given = command.settings()
        assert given.rounds == 2
        assert given.env["A"] == "b"
        assert given.points == PRESETS["smoke"]().settings["points"]


class TestClientCommand:
    def load(self, **given):
        point = Point(workload="random", prompt_tokens=9, output_tokens=4, requests=4, **given)
        return client_arguments(
            Load(
                url="http://h:1",
                model="m",
                point=point,
                requests=Path("r.jsonl"),
                count=5,
                seed=3,
                result=Path("d/f.json"),
                log=Path("l"),
                timeout_s=1,
            )
        )

    def test_open_loop(self):
        command = self.load(rate=2.5)
        assert command[command.index("--request-rate") + 1] == "2.5"
        assert "--max-concurrency" not in command

    def test_closed_loop(self):
        command = self.load(concurrency=2)
        assert command[command.index("--max-concurrency") + 1] == "2"
        assert "--request-rate" not in command

    def test_vllm_knows_every_flag(self):
        pytest.importorskip("pandas")
        from vllm.benchmarks.serve import add_cli_args
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        command = self.load(rate=2.5)
        parsed = parser.parse_args(command)
        assert parsed.dataset_name == "custom"
        assert parsed.custom_output_len == -1
        assert parsed.temperature == 0


class TestFirstDifference:
    def answer(self, *tokens):
        return Answer(text="", tokens=tokens, top=[{1: -0.5, 2: -0.75, 3: -4.0}] * len(tokens))

    def test_same(self):
        assert first_difference(self.answer(1, 2), self.answer(1, 2)) == (2, None)

    def test_gap_of_the_first_tokens_that_differ(self):
        assert first_difference(self.answer(1, 1, 1), self.answer(1, 2, 3)) == (1, 0.25)

    def test_token_that_stock_finds_unlikely(self):
        assert first_difference(self.answer(1), self.answer(9)) == (0, float("inf"))


METRICS = """# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} %s
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} %s
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0"} 0
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0"} %s
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{engine="0"} 100
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0"} %s
"""


class TestMetrics:
    def test_peaks_and_growth(self):
        rows = [(0.1, 1, 5, 10), (0.7, 4, 6, 20), (0.0, 0, 8, 35)]
        found = counts([read_sample(METRICS % row) for row in rows])
        assert (found.peak_kv_share, found.peak_running) == (0.7, 4)
        assert (found.preemptions, found.prefix_hit_tokens) == (3, 25)
        assert found.samples == 3

    def test_several_engines(self):
        two = METRICS % (0.5, 1, 0, 0) + 'vllm:num_requests_running{engine="1"} 2\n'
        assert read_sample(two).values["vllm:num_requests_running"] == 3

    def test_missing_metric_is_told(self):
        with pytest.raises(RuntimeError, match="expected vllm:kv_cache_usage_perc"):
            read_sample("")

    def test_capacity_from_the_log(self):
        log = "x\nCPU KV cache size: 1,234 tokens, Maximum concurrency for 64 tokens per request: 2.5x"
        assert capacity(log) == (1234, 64, 2.5)
        assert capacity("nothing") == (None, None, None)


class TestSummary:
    def test_latencies_of_each_request(self):
        raw = {
            "latencies": [1.0, 0.2],
            "ttfts": [0.4, 0.2],
            "output_lens": [4, 1],
            "itls": [[0.1, 0.3, 0.2], []],
        }
        found = samples_ms(raw)
        assert found["tpot_ms"] == pytest.approx([200.0])  # one token has no time per next token
        assert found["itl_ms"] == pytest.approx([100.0, 300.0, 200.0])
        assert found["e2e_ms"] == pytest.approx([1000.0, 200.0])

    def test_quantiles(self):
        found = quantiles([float(i) for i in range(101)])
        assert (found.median, found.p95, found.p99, found.samples) == (50, 95, 99, 101)


class TestTimeLeft:
    def test_from_the_same_point_or_from_all(self):
        tasks = [Task(point, "stock", 0) for point in POINTS]
        assert time_left_s(tasks, {}) is None
        assert time_left_s(tasks, {POINTS[0].key: [10.0, 20.0]}) == 30.0
        assert time_left_s(tasks, {POINTS[0].key: [10.0], POINTS[1].key: [60.0]}) == 70.0


class TestDummyModel:
    def test_shape_tokenizer_and_pattern(self, tmp_path):
        folder = make_dummy_model(tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        shape = [config[k] for k in ("num_hidden_layers", "hidden_size", "head_dim")]
        assert shape == [4, 512, 64]
        assert (folder / "tokenizer.json").is_file()
        chosen = HeadPattern.load(folder / "duo_pattern").select(sparsity=0.75)
        assert chosen.retrieval.shape == (4, 16)
        assert chosen.sparsity == 0.75
