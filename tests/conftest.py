"""Set before torch, vLLM and Triton are imported; and which tests stay together or are skipped."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

# The models and tensors of the suite are tiny: a second thread costs more than it computes, above all
# while another process (a server under test, the suite's other half) uses the other core.
os.environ["OMP_NUM_THREADS"] = "1"

# Without an NVIDIA device the Triton kernels run in Triton's interpreter. It has to be chosen before
# Triton's own library is imported; only this process runs it, the servers that tests start do not.
HAS_DEVICE = Path("/dev/nvidiactl").exists()
HAS_AVX512 = "avx512f" in Path("/proc/cpuinfo").read_text()
if not HAS_DEVICE and importlib.util.find_spec("triton") is not None:
    chosen = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("triton.language")
    if chosen is None:
        del os.environ["TRITON_INTERPRET"]


# Before xdist's own hook, which reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests together that share something costly, and say why a test of the GPU does not run.

    The suite runs in two processes (pytest-xdist); a file's tests stay in one of them. So do all files
    that ask the session's one server: a second one would cost more than it brings.
    """
    users = {item.path for item in items if "half_server" in getattr(item, "fixturenames", ())}
    no_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU: this machine has no /dev/nvidiactl")
    for item in items:
        group = "half_server" if item.path in users else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
        if item.get_closest_marker("gpu") and not HAS_DEVICE:
            item.add_marker(no_gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this processor cannot run; docs/compatibility.md names it on all of them."""
    if item.get_closest_marker("avx512") and not HAS_AVX512:
        pytest.skip("needs a processor with AVX-512: /proc/cpuinfo names no avx512f")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node: Any, ids: list[str]) -> None:
    """Refuse to run without the groups: every server would be started once in each process."""
    if node.config.option.dist == "loadgroup" and not all("@" in name for name in ids):
        pytest.exit(
            f"pytest-xdist did not group the tests: expected '@' in their ids, got {ids[0]!r}; "
            "install a pytest that it knows (see pyproject.toml)",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )
