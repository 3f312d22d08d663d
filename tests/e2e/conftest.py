"""Engines in this process: five seconds each instead of a server's minute."""

from __future__ import annotations

import os

# vLLM reads these when it is imported. Numba would compile its n-gram proposer for half a minute.
os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="WARNING",
    NUMBA_DISABLE_JIT="1",
)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest

from tests.models.random_models import make_model
from tests.models.vision_models import KV_HEADS, make_vision_model


@pytest.fixture(scope="session", autouse=True)
def kernels_once():
    """vLLM registers its CPU kernels at every start of an engine, and fails once numba is loaded.

    Its search through all modules (``vllm.triton_utils.dispatcher``) trips over llvmlite's functions.
    What the first engine of a process has registered stays.
    """
    from vllm.platforms.cpu import CpuPlatform

    own, done = CpuPlatform.register_triton_kernel_overrides, []

    def once(cls):
        if not done:
            done.append(own())

    CpuPlatform.register_triton_kernel_overrides = classmethod(once)
    yield
    CpuPlatform.register_triton_kernel_overrides = own


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Makes each random checkpoint once."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def get(shape):
        if shape not in made:
            made[shape] = make_model(shape, folder)
        return made[shape]

    return get


@pytest.fixture(scope="session")
def vision_model(tmp_path_factory):
    """Makes each multimodal checkpoint once."""
    folder, made = tmp_path_factory.mktemp("vision_models"), {}

    def get(family):
        if family not in made:
            made[family] = make_vision_model(family, folder)
        return made[family]

    return get


@pytest.fixture
def picture_engine(vision_model, tmp_path):
    """Starts engines of a family's model, with duo and a mask, or without where the mask is None.

    Unless other settings say so, a step's chunk is shorter than a picture.
    """
    from tests.e2e.engine import engine, write_pattern
    from tests.e2e.pictures import RECENT, SINK, limits_of
    from tests.e2e.test_exactness import mask_of

    def serve(family, mask="mixed", **settings):
        pattern = mask and write_pattern(tmp_path / mask, mask_of(mask, KV_HEADS))
        usual = {
            **{"sink_size": SINK, "recent_size": RECENT, "max_num_batched_tokens": 100},
            **{"limit_mm_per_prompt": limits_of(family), "skip_tokenizer_init": False},
        }
        return engine(vision_model(family), pattern, **(usual | settings))

    return serve


@pytest.fixture
def picture_oracle(vision_model):
    """Of a family's model, and of a mask."""
    from tests.e2e.pictures import RECENT, SINK, PictureOracle
    from tests.e2e.test_exactness import mask_of

    def get(family, mask="mixed", **settings):
        masked = mask_of(mask, KV_HEADS)
        return PictureOracle(vision_model(family), masked, SINK, RECENT, **settings)

    return get


@pytest.fixture(scope="session")
def half_server(tmp_path_factory):
    """One server for many tests: the needle model with its own pattern, half its heads streaming."""
    from tests.e2e.needle import serve

    with serve(tmp_path_factory.mktemp("server") / "log", "--attention-backend", "duo") as server:
        server.wait_until_ready()
        yield server
