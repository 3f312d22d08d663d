"""Set before torch and vLLM are imported; and which tests must stay together."""

import os

import pytest

# The models and tensors of the suite are tiny: a second thread costs more than it computes, above all
# while another process (a server under test, the suite's other half) uses the other core.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The suite runs in two processes (pytest-xdist); a file's tests stay in one of them.

    So do all files that ask the session's one server: a second one would cost more than it brings.
    """
    users = {item.path for item in items if "half_server" in getattr(item, "fixturenames", ())}
    for item in items:
        group = "half_server" if item.path in users else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
