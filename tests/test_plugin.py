"""The plugin's entry point: what it registers, for which vLLM, and that it may run twice."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
import vllm
from vllm.config import AttentionConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched import scheduler
from vllm.v1.kv_cache_spec_registry import _REGISTRY_KVCACHESPEC_LIST

from tests.messages import messages_of
from vllm_duo import compat, plugin
from vllm_duo.attention.backend import DuoAttentionBackend
from vllm_duo.compat.after_import import _PatchingFinder
from vllm_duo.server_plan import BACKEND_PATH

CPU_ATTN = AttentionBackendEnum.CPU_ATTN
CUSTOM = AttentionBackendEnum.CUSTOM
SELECTOR = AttentionSelectorConfig(
    head_size=64, dtype=torch.float32, kv_cache_dtype=None, block_size=128
)


@pytest.fixture(autouse=True)
def registered():
    plugin.register()


def test_vllm_finds_the_plugin():
    (found,) = entry_points(group="vllm.general_plugins", name="duo")
    assert found.value == "vllm_duo.plugin:register"


def test_import_is_cheap():
    code = "import sys, vllm_duo.plugin; print({'torch', 'vllm', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_registering_again_changes_nothing():
    def state():
        return (
            dict(AttentionBackendEnum.__members__),
            dict(_REGISTRY_KVCACHESPEC_LIST),
            vars(type(current_platform)).copy(),
            kv_cache_utils.get_kv_cache_groups,
            scheduler.Scheduler.make_stats,
            sum(isinstance(finder, _PatchingFinder) for finder in sys.meta_path),
        )

    before = state()
    plugin.register()
    assert state() == before


class TestVersions:
    @pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.32.0rc1", "0.33.9"])
    def test_supported(self, version):
        assert plugin.version_problem(version) is None

    @pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "0.3.2", "1.0", "junk", ""])
    def test_unsupported_is_told_in_one_sentence(self, version):
        problem = plugin.version_problem(version)
        assert problem.startswith(
            f"vllm-duo supports vLLM >=0.32,<0.34 and found {version}: the attention backend 'duo' "
            "is not registered"
        )
        assert "\n" not in problem

    @pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "junk"])
    @pytest.mark.refused("vLLM outside 0.32 and 0.33")
    def test_unsupported_registers_nothing(self, version, monkeypatch):
        messages = messages_of(plugin, monkeypatch)
        monkeypatch.setattr(vllm, "__version__", version)
        monkeypatch.setattr(registry, "register_backend", lambda *_: pytest.fail("registered"))
        monkeypatch.setattr(compat, "install", lambda: pytest.fail("patched"))
        plugin.register()
        assert messages == [("ERROR", plugin.version_problem(version))]


class TestName:
    @pytest.mark.parametrize("name", ["duo", "DUO", "Duo", "custom"])
    def test_config_takes_it(self, name):
        assert AttentionConfig(backend=name).backend is CUSTOM

    def test_command_line_takes_it(self):
        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        parsed = parser.parse_args(["--attention-backend", "duo"])
        assert AttentionConfig(backend=parsed.attention_backend).backend is CUSTOM

    def test_it_pickles_as_a_member_that_every_process_has(self):
        pickled = pickle.dumps(AttentionConfig(backend="duo"))
        assert b"DUO" not in pickled
        assert pickle.loads(pickled).backend is CUSTOM

    def test_it_stands_for_our_class(self):
        assert AttentionBackendEnum["DUO"].get_class() is DuoAttentionBackend

    def test_our_class_is_called_by_a_name_that_vllm_knows(self):
        assert AttentionBackendEnum[DuoAttentionBackend.get_name()] is CUSTOM


class TestCpuPlatform:
    """vLLM's CPU platform always answers CPU_ATTN; ours only where duo was asked for."""

    @staticmethod
    def selected(backend):
        return current_platform.get_attn_backend_cls(backend, attn_selector_config=SELECTOR)

    def test_duo_is_served_by_our_class(self):
        assert self.selected(CUSTOM) == BACKEND_PATH

    @pytest.mark.parametrize("backend", [None, CPU_ATTN])
    def test_everything_else_is_vllms(self, backend):
        assert self.selected(backend) == CPU_ATTN.get_path()

    def test_another_plugins_backend_is_not_ours(self):
        register_backend(CUSTOM, "another.plugin.Backend")
        try:
            assert self.selected(CUSTOM) == CPU_ATTN.get_path()
        finally:
            register_backend(CUSTOM, BACKEND_PATH)
