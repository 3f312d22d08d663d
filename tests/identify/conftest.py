from __future__ import annotations

import pytest
import torch

from tests.identify import tiny
from vllm_duo.identify.methods import Job, complete
from vllm_duo.identify.model import hook_model
from vllm_duo.identify.run import with_default_samples
from vllm_duo.identify.settings import IdentifySettings


def tiny_settings(**more):
    return IdentifySettings(
        **{
            "sink_size": tiny.SINK,
            "recent_size": tiny.RECENT,
            "max_length": 96,
            "min_length": 80,
            "check_samples": 2,
            **more,
        }
    )


def make_job(model, **more):
    hooked = hook_model(model, tiny.tokenizer(), "tiny", torch.device("cpu"))
    return Job(hooked, with_default_samples(complete(tiny_settings(**more), hooked)))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return tiny.save(tiny.random_llama(), tmp_path_factory.mktemp("models") / "tiny")
