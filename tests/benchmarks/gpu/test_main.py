"""The GPU benchmark from its flags to its files, its refusal, and what it imports."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import attention
from benchmarks.gpu import baselines, gate, main, results, retrieval_kernels, timing
from benchmarks.gpu.cases import Limits
from tests.benchmarks.gpu.toys import PLAIN, STAND_IN, toy
from tests.ops.triton_cases import implementation  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[3]


class TestRun:
    @pytest.fixture
    def out(self, tmp_path):
        return Namespace(
            out=tmp_path / "a" / "r.json", plot=tmp_path / "b" / "r.png", max_seconds=1e9
        )

    def test_writes_json_a_table_and_a_plot(self, machine, out):
        said = io.StringIO()
        result = {"device": "a GPU", "baselines": ["plain"]}
        points = [toy(20, 1), toy(40, 1), toy(14, 6, 1)]
        main.run(points, machine(), out, result, Console(file=said, width=200))
        written = json.loads(out.out.read_text())
        assert [row["context"] for row in written["points"]] == [21, 41, 20]
        assert written["device"] == "a GPU"
        assert out.plot.read_bytes().startswith(b"\x89PNG")
        table = said.getvalue()
        for text in ("duo 50%", "plain (best full)", "2 x 21", "chunk 6", "memory", "x best full"):
            assert text in table

    def test_what_is_left_after_the_time_is_listed(self, machine, out):
        out.max_seconds = -1
        said = io.StringIO()
        result = {"device": "a GPU", "baselines": ["plain"]}
        rows = main.run([toy(20, 1)], machine(), out, result, Console(file=said, width=200))
        assert rows[0]["skipped"] == "after -1 s (--max-seconds)"
        assert "after -1 s (--max-seconds)" in said.getvalue()
        assert not out.plot.exists()

    def test_nothing_to_plot_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="no point was measured"):
            results.plot([{"skipped": "why"}], tmp_path / "none.png", "title")


class TestWithoutAGpu:
    def test_it_says_what_to_do(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert attention.main(["--device", "cuda", "--smoke"]) == 2
        said = capsys.readouterr().out
        assert said.startswith("benchmarks.attention --device cuda: expected a PyTorch built for")
        assert f"got torch {torch.__version__} with " in said
        assert "or measure this processor with --device cpu" in said
        assert said.count("\n") == 1

    def test_an_older_gpu_is_refused_too(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a T4")
        assert "got a T4 of compute capability (7, 5)" in main.refusal()

    def test_failed_gate_times_nothing(self, monkeypatch, capsys):
        monkeypatch.setattr(main, "refusal", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(baselines, "installed", lambda device: iter([("full", "is missing")]))
        monkeypatch.setattr(gate, "check_small", lambda *arguments, **others: ([], [], {}))
        assert main.main([]) == 1
        said = capsys.readouterr().out
        assert "the correctness gate failed, nothing was timed" in said
        assert "{'full': 'is missing'}" in said

    @pytest.fixture
    def device(self, monkeypatch):
        """What ``main`` asks of a device, as of an H200; nothing is computed on it."""
        properties = Namespace(
            name="NVIDIA H200",
            major=9,
            minor=0,
            multi_processor_count=132,
            total_memory=139 << 30,
            L2_cache_size=60 << 20,
        )
        monkeypatch.setattr(main, "refusal", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (130 << 30, 139 << 30))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(timing, "measure_limits", lambda device: Limits(4300.0, 790.0))
        found = [PLAIN, ("FlashInfer", "no module")]
        monkeypatch.setattr(baselines, "installed", lambda device: iter(found))
        monkeypatch.setattr(retrieval_kernels, "installed", lambda: iter([STAND_IN]))
        monkeypatch.setattr(
            gate, "check_small", lambda *arguments, kernels: ([PLAIN], kernels, {"other": "wrong"})
        )

    def test_from_flags_to_files(self, device, monkeypatch, capsys, tmp_path):
        def measure(point, machine):
            assert machine.free_bytes() == 130 << 30
            assert machine.cache_bytes == 60 << 20
            assert machine.kernels == [STAND_IN]
            names = [*map(gate.contender, point.sparsities), "plain"]
            times = {name: [2.0 + n, 1.0 + n] for n, name in enumerate(names)}
            return results.times_row(point, times, 4, machine.limits)

        monkeypatch.setattr(main, "measure", measure)
        out, drawn = tmp_path / "r.json", tmp_path / "r.svg"
        flags = ["--device", "cuda", "--smoke", "--out", str(out), "--plot", str(drawn)]
        assert attention.main(flags) == 0
        written = json.loads(out.read_text())
        assert written["device"] == "NVIDIA H200"
        assert written["limits"] == {"copy_gb_s": 4300.0, "gemm_tflop_s": 790.0}
        assert written["baselines"] == ["plain"]
        assert written["retrieval_prefill"] == ["triton", "stand-in"]
        assert written["not_compared"] == {"FlashInfer": "no module", "other": "wrong"}
        assert written["triton"]
        assert len(written["points"]) == len(main.points(main.parser().parse_args(["--smoke"])))
        assert drawn.read_text().startswith("<?xml")
        assert "Llama-2-7B" in capsys.readouterr().out

    def test_a_failed_point_is_an_exit_code(self, device, monkeypatch, capsys):
        monkeypatch.setattr(
            main, "measure", lambda point, machine: {**results.point_row(point), "failed": "wrong"}
        )
        assert attention.main(["--device", "cuda", "--smoke"]) == 1
        assert "wrong" in capsys.readouterr().out


class TestImports:
    def test_imports_need_no_vllm_and_no_package_that_a_bare_gpu_machine_lacks(self):
        """As in a folder of sources on a machine with torch, Triton, NumPy, rich and matplotlib."""
        code = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("vllm", "pydantic", "typer", "flashinfer") or name == "vllm_duo._cpu":
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Blocker())
import os
os.environ["VLLM_DUO_OPS"] = "reference"
from benchmarks import attention
from benchmarks.gpu import main
from vllm_duo.ops.layer import triton
assert not [name for name in sys.modules if name.split(".")[0] in ("vllm", "pydantic")]
raise SystemExit(attention.main(["--device", "cuda"]))
"""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stderr
        assert "expected a PyTorch built for CUDA" in done.stdout

    def test_kernels_for_cpus_are_missed_only_when_one_is_to_run(self):
        code = """
import sys
sys.modules["vllm_duo._cpu"] = None
from vllm_duo.ops import cpu
print(cpu.describe())
cpu.use_reference = False
cpu.supported_isas()
"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"VLLM_DUO_OPS": "reference", "PATH": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == "PyTorch references (VLLM_DUO_OPS=reference)\n"
        assert "compiled kernels (vllm_duo._cpu) are missing" in done.stderr
