"""One result of each kind."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.evaluate.test_run import evaluated, finds_the_needle  # noqa: F401 - a fixture
from tests.planning.models import write_model
from vllm_duo import HeadPattern
from vllm_duo.planning.plan import PlanRequest, plan_memory


@pytest.fixture
def plan_file(tmp_path):
    model = write_model(tmp_path / "model", 32, 32, 8, 4096)
    request = PlanRequest(
        model=model, duo={"pattern": "Meta-Llama-3.1-8B-Instruct"}, kv_cache_bytes=40 * 2**30
    )
    file = tmp_path / "plan.json"
    file.write_text(plan_memory(request).model_dump_json())
    return file


@pytest.fixture
def eval_folder(evaluated, tmp_path):  # noqa: F811
    def answer(name, prompt):
        return "" if name == "duo-0.75" else finds_the_needle(name, prompt)

    given = {"sparsities": (0.5, 0.75), "perplexity": True, "tasks": ("needle", "copying")}
    results = evaluated(answer, lengths=(100, 400), **given)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def pattern_folder(tmp_path):
    values = np.random.default_rng(7).random((6, 4))
    HeadPattern(values, {"deploy_sink_size": 16}).save(tmp_path / "pattern")
    return tmp_path / "pattern"


@pytest.fixture
def serve_file(serve_data, tmp_path):
    file = tmp_path / "serve.json"
    file.write_text(json.dumps(serve_data))
    return file


@pytest.fixture
def runs(plan_file, eval_folder, pattern_folder, serve_file):
    """All of them."""
    return [pattern_folder, plan_file, eval_folder, serve_file]


def quantiles(median):
    return {"median": median, "p95": 2 * median, "p99": 3 * median, "mean": median, "samples": 9}


def spread(median):
    return {"median": median, "low": median - 1, "high": median + 1}


def side(name, throughput, latency):
    latencies = {key: quantiles(latency) for key in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")}
    return {
        "side": name,
        "rounds": 2,
        "output_tokens_per_s": spread(throughput),
        "total_tokens_per_s": spread(10 * throughput),
        **latencies,
        "median_tpot_ms": spread(latency),
        "median_ttft_ms": spread(latency),
        "peak_kv_share": 0.5,
        "peak_running": 2,
        "preemptions": 3,
        "prefix_hit_rate": None,
        "passkeys_asked": 4,
        "passkeys_right": 3,
        "times_stock_output": None if name == "stock" else spread(2.0),
    }


def point(load, *sides):
    return {
        "key": f"random-{load}",
        "workload": "random",
        "prompt_tokens": 1024,
        "output_tokens": 64,
        "requests": 8,
        "rate": None,
        "concurrency": load,
        "sides": list(sides),
    }


def served(name, tokens):
    return {
        "side": name,
        "sparsity": None if name == "stock" else 0.5,
        "command": ["vllm", "serve"],
        "max_model_len": 2048,
        "kv_tokens": tokens,
        "concurrent_requests": 1.0,
        "concurrent_request_tokens": 2048,
    }


@pytest.fixture
def serve_data():
    return {
        "schema_version": 1,
        "kind": "serve",
        "complete": True,
        "settings": {"model": "m"},
        "versions": {"cpu": "Some CPU"},
        "gate": {
            "passed": True,
            "compared_tokens": 9,
            "near_ties": 0,
            "differences": [],
            "passkeys": [],
            "judges_passkeys": True,
        },
        "sides": [served("stock", 1000), served("duo-0.5", 1900)],
        "points": [
            point(8, side("stock", 30.0, 20.0), side("duo-0.5", 60.0, 15.0)),
            point(1, side("stock", 10.0, 5.0), side("duo-0.5", 11.0, 4.0)),
        ],
    }
