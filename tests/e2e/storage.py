"""Engines with ``DuoStorageConnector``, and what they load."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group

from tests.e2e.engine import engine, write_pattern
from tests.e2e.stepper import Stepper
from tests.e2e.test_exactness import mask_of
from tests.models.random_models import Shape
from tests.oracle import Oracle
from vllm_duo.kv_transfer import CONNECTOR, MODULE

SHAPE = Shape("llama", group=2, head_size=32, kv_heads=4)
SINK, RECENT = 20, 75
BLOCK = 16
NEW_TOKENS = 24
MASKS = {
    **{name: mask_of(name, SHAPE.kv_heads) for name in ("mixed", "streaming", "retrieval")},
    "several bins": [[True, False, False, False]] * 3,
}


def json_config(folder, max_bytes=1 << 30):
    """``--kv-transfer-config`` as a command line has it."""
    return {
        "kv_connector": CONNECTOR,
        "kv_connector_module_path": MODULE,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"path": str(folder), "max_bytes": max_bytes},
    }


@contextmanager
def storing_engine(model, pattern, folder, *, max_bytes=1 << 30, **settings):
    """An engine that keeps prefixes in the folder; written files are there when it has ended."""
    config = KVTransferConfig(**json_config(folder, max_bytes))
    with engine(
        model, pattern, enable_prefix_caching=True, kv_transfer_config=config, **settings
    ) as running:
        yield running


def written():
    """Wait until this process's engine has written what it stores."""
    writer = get_kv_transfer_group()._writer
    if writer is not None:
        writer.flush()


def record_loads(running):
    """Tokens loaded from files from now on, by the name that the request was given."""
    connector, loads = running.core.scheduler.connector, Counter()
    allocated = connector.update_state_after_alloc

    def record(request, blocks, num_external_tokens):
        loads[request.request_id.rpartition("-")[0]] += num_external_tokens
        allocated(request, blocks, num_external_tokens)

    connector.update_state_after_alloc = record
    return loads


def write_patterns(folder):
    """A pattern folder of each mask, by name."""
    return {name: write_pattern(folder / name, mask) for name, mask in MASKS.items()}


def tokens_of(answers):
    return [answer.tokens for answer in answers]


def stored_end(prompt):
    """Tokens of a prompt that a repetition resumes at."""
    return (len(prompt) - 1) // BLOCK * BLOCK


def oracle_of(model, name="mixed"):
    return Oracle(model, MASKS[name], SINK, RECENT)


def asked(running, monkeypatch, prompts, **sampling):
    """Answers of prompts one after another, and the tokens that each took from files."""
    stepper, loads = Stepper(running, monkeypatch), record_loads(running)
    answers = [
        stepper.ask(str(index), prompt, max_tokens=NEW_TOKENS, **sampling)
        for index, prompt in enumerate(prompts)
    ]
    return answers, [loads[str(index)] for index in range(len(prompts))]
