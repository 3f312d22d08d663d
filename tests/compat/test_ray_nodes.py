"""The check of a Ray cluster's nodes, with answers that are made up; e2e/test_ray.py has real ones."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_duo import HeadPattern
from vllm_duo.cluster import make_probe
from vllm_duo.compat import ray_nodes
from vllm_duo.plugin import register


@pytest.fixture
def server(tmp_path):
    """Makes a server's config with as much as the check reads."""
    register()
    folder = tmp_path / "pattern"
    HeadPattern(np.arange(8, dtype=float).reshape(4, 2) / 8).save(folder)

    def server(backend=AttentionBackendEnum.CUSTOM):
        return SimpleNamespace(
            attention_config=SimpleNamespace(backend=backend),
            additional_config={"duo": {"pattern": str(folder)}},
            model_config=SimpleNamespace(
                model="any",
                get_total_num_hidden_layers=lambda: 4,
                get_total_num_kv_heads=lambda: 2,
                get_sliding_window=lambda: None,
                hf_text_config=SimpleNamespace(),
                original_max_model_len=None,
                max_model_len=256,
            ),
            parallel_config=SimpleNamespace(
                tensor_parallel_size=2, pipeline_parallel_size=1, placement_group="group"
            ),
        )

    return server


@pytest.fixture
def nodes(monkeypatch):
    """Nodes by address, each with a change of this process's own answer; notes what they are asked."""

    def nodes(**changes):
        asked = []

        def ask_nodes(group, question, runtime_env):
            asked.append((group, question, runtime_env))
            own = make_probe()(question)
            return {
                name: change if isinstance(change, str) else own | change
                for name, change in changes.items()
            }

        monkeypatch.setattr(ray_nodes, "ask_nodes", ask_nodes)
        return asked

    return nodes


def check(config):
    ray_nodes.check_nodes(config, {"env_vars": {}}, overwrites=False)


def test_nodes_like_this_one_pass(server, nodes):
    asked = nodes(first={}, second={})
    check(server())
    ((group, _, runtime_env),) = asked
    assert (group, runtime_env) == ("group", {"env_vars": {}})


def test_every_other_node_is_named(server, nodes):
    nodes(
        first={},
        second={"import_error": "no numpy"},
        third="it could not be asked (Timeout)",
        fourth={"plugins": "other"},
    )
    with pytest.raises(RuntimeError, match="not ready on every node") as caught:
        check(server())
    lines = str(caught.value).splitlines()[1:]
    assert [line.split()[2].rstrip(":") for line in lines] == ["second", "third", "fourth"]
    assert "(no numpy)" in lines[0]
    assert lines[1] == "  - node third: it could not be asked (Timeout)"
    assert "VLLM_PLUGINS='other'" in lines[2]


def test_other_servers_ask_nobody(server, nodes):
    asked = nodes(first={"import_error": "no numpy"})
    check(server(AttentionBackendEnum.CPU_ATTN))
    assert asked == []


class RayExecutorV2:
    """Stands in for vLLM's: what is called just before its workers start."""

    def _build_runtime_env(self):
        return {"env_vars": {"A": "1"}}


class RayDistributedExecutor:
    """The same of the older one."""

    def _init_workers_ray(self, placement_group, **kwargs):
        self.started = (placement_group, kwargs)


@pytest.fixture
def executor(server):
    """Makes a patched stand-in."""

    def executor(patch, kind):
        patched = type(kind.__name__, (kind,), {})
        patch(SimpleNamespace(**{kind.__name__: patched}))
        made = patched()
        made.vllm_config = server()
        return made

    return executor


def test_the_default_executor_asks_with_its_workers_environment(executor, nodes, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "duo,more")
    asked = nodes(first={})
    made = executor(ray_nodes.patch_v2, RayExecutorV2)
    assert made._build_runtime_env() == {"env_vars": {"A": "1"}}
    ((_, question, runtime_env),) = asked
    assert runtime_env == {"env_vars": {"A": "1"}}
    assert question["environment"]["VLLM_PLUGINS"] == "duo,more"
    assert question["overwrites"] is False


def test_the_older_executor_asks_first(executor, nodes):
    asked = nodes(first={})
    made = executor(ray_nodes.patch_v1, RayDistributedExecutor)
    made._init_workers_ray("group", runtime_env={"env_vars": {}}, more=1)
    assert made.started == ("group", {"runtime_env": {"env_vars": {}}, "more": 1})
    assert asked[0][1]["overwrites"] is True


@pytest.mark.parametrize(
    ("patch", "kind", "start"),
    [
        (ray_nodes.patch_v2, RayExecutorV2, lambda made: made._build_runtime_env()),
        (ray_nodes.patch_v1, RayDistributedExecutor, lambda made: made._init_workers_ray("group")),
    ],
)
def test_no_worker_starts_where_a_node_lacks_the_plugin(executor, nodes, patch, kind, start):
    nodes(first={"import_error": "No module named 'vllm_duo'"})
    made = executor(patch, kind)
    with pytest.raises(RuntimeError, match="not ready on every node"):
        start(made)
    assert not hasattr(made, "started")
