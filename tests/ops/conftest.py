"""Every operator test runs over the reference and over each variant that this machine can run."""

import pytest

from vllm_duo.ops import cpu


@pytest.fixture(autouse=True, params=["reference", *cpu.supported_isas()])
def implementation(request, monkeypatch):
    before = cpu.isa()
    monkeypatch.setattr(cpu, "use_reference", request.param == "reference")
    if request.param != "reference":
        cpu.force_isa(request.param)
    yield request.param
    cpu.force_isa(before)
