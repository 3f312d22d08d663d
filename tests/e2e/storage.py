"""Engines with ``DuoStorageConnector``, and what they load."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group

from tests.e2e.engine import engine
from vllm_duo.kv_transfer import CONNECTOR, MODULE


def transfer_config(folder, max_bytes=1 << 30):
    """``--kv-transfer-config`` as Python has it."""
    return KVTransferConfig(
        kv_connector=CONNECTOR,
        kv_connector_module_path=MODULE,
        kv_role="kv_both",
        kv_connector_extra_config={"path": str(folder), "max_bytes": max_bytes},
    )


@contextmanager
def storing_engine(model, pattern, folder, *, max_bytes=1 << 30, **settings):
    """An engine that keeps prefixes in the folder; written files are there when it has ended."""
    config = transfer_config(folder, max_bytes)
    with engine(
        model, pattern, enable_prefix_caching=True, kv_transfer_config=config, **settings
    ) as running:
        yield running


def written():
    """Wait until this process's engine has written what it stores."""
    get_kv_transfer_group()._writer.flush()


def record_loads(running):
    """Tokens loaded from files from now on, by the name that the request was given."""
    connector, loads = running.core.scheduler.connector, Counter()
    allocated = connector.update_state_after_alloc

    def record(request, blocks, num_external_tokens):
        loads[request.request_id.rpartition("-")[0]] += num_external_tokens
        allocated(request, blocks, num_external_tokens)

    connector.update_state_after_alloc = record
    return loads
