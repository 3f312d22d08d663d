"""``StatLoggerManager``: our metrics, on servers with duo only.

Symptom: with a logger in the entry point group ``vllm.stat_logger_plugins``, every server of the
environment collects statistics, even under ``--disable-log-stats``; offline engines do not load that
group at all.
Why: vLLM takes the mere presence of a plugin logger for the wish to log.
Condition: the server runs duo. Our logger goes first: it takes the counts of
``compat/scheduler_stats`` out before vLLM's loggers see them.
May go: once a stat logger plugin can decline.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any


def patch(module: ModuleType) -> None:
    """Wrap the constructor.

    Args:
        module: ``vllm.v1.metrics.loggers``.
    """
    manager = module.StatLoggerManager
    original = manager.__init__

    @wraps(original)
    def __init__(
        self: Any,
        vllm_config: Any,
        engine_idxs: Any = None,
        custom_stat_loggers: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        from vllm_duo.server_plan import is_duo

        if is_duo(vllm_config):
            from vllm_duo.metrics import DuoStatLogger

            custom_stat_loggers = [DuoStatLogger, *(custom_stat_loggers or [])]
        original(self, vllm_config, engine_idxs, custom_stat_loggers, *args, **kwargs)

    manager.__init__ = __init__
