"""Our metrics are added on servers with duo, and nowhere else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_duo import metrics, server_plan
from vllm_duo.compat import stat_loggers


@pytest.fixture
def manager():
    class StatLoggerManager:
        def __init__(self, vllm_config, engine_idxs=None, custom_stat_loggers=None, **rest):
            self.loggers = custom_stat_loggers

    stat_loggers.patch(SimpleNamespace(StatLoggerManager=StatLoggerManager))
    return StatLoggerManager


def test_duo_server_gets_its_logger_first(manager, monkeypatch):
    monkeypatch.setattr(server_plan, "is_duo", lambda _: True)
    assert manager(object()).loggers == [metrics.DuoStatLogger]
    assert manager(object(), [0], ["mine"]).loggers == [metrics.DuoStatLogger, "mine"]


def test_other_servers_are_left_alone(manager, monkeypatch):
    monkeypatch.setattr(server_plan, "is_duo", lambda _: False)
    assert manager(object()).loggers is None
    assert manager(object(), custom_stat_loggers=["mine"]).loggers == ["mine"]
