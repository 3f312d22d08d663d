"""Lets vLLM look at models in the tests' own process."""

from __future__ import annotations

import os

import pytest
from vllm.model_executor.models import registry


@pytest.fixture(scope="module", autouse=True)
def this_process():
    """Models are looked at here instead of in a process of 20 s each; settings of it come back."""
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda look: look())
        yield
    os.environ.clear()
    os.environ.update(before)
