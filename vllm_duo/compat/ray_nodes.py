"""``RayExecutorV2._build_runtime_env``, ``RayDistributedExecutor._init_workers_ray``: nodes alike.

Symptom: a node without the plugin, or with another version or pattern, joins in. On CPUs its ranks run
vLLM's own attention, elsewhere they end in a stack trace that does not name the plugin; with another
pattern they answer wrongly.
Why: every Ray worker loads plugins and resolves paths on its own node, and vLLM does not compare them.
Condition: vLLM is about to start the Ray workers of a server with duo; these are the last methods of
either executor before that, called once the placement group is known.
May go: once vLLM compares its workers' plugins.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import wraps
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vllm_duo.cluster import ENVIRONMENT, Question, facts, make_probe, payload, problem_of
from vllm_duo.logging import get_logger
from vllm_duo.server_plan import is_duo, windows_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = get_logger(__name__)

PATIENCE_S = 300.0
"""How long a node may take to answer: Ray starts a process there, which imports this package."""


def patch_v2(module: ModuleType) -> None:
    """Ask before ``RayExecutorV2`` starts its workers; it keeps a node's own variables.

    Args:
        module: ``vllm.v1.executor.ray_executor_v2``.
    """
    original = module.RayExecutorV2._build_runtime_env

    @wraps(original)
    def _build_runtime_env(self: Any) -> dict[str, Any]:
        runtime_env = original(self)
        check_nodes(self.vllm_config, runtime_env, overwrites=False)
        return runtime_env

    module.RayExecutorV2._build_runtime_env = _build_runtime_env


def patch_v1(module: ModuleType) -> None:
    """Ask before ``RayDistributedExecutor`` starts its workers; the server's variables count.

    Args:
        module: ``vllm.v1.executor.ray_executor``.
    """
    original = module.RayDistributedExecutor._init_workers_ray

    @wraps(original)
    def _init_workers_ray(self: Any, placement_group: Any, **kwargs: Any) -> None:
        runtime_env = dict(kwargs.get("runtime_env") or {})
        check_nodes(self.vllm_config, runtime_env, overwrites=True)
        original(self, placement_group, **kwargs)

    module.RayDistributedExecutor._init_workers_ray = _init_workers_ray


def check_nodes(
    vllm_config: VllmConfig, runtime_env: Mapping[str, Any], *, overwrites: bool
) -> None:
    """Ask every node of the placement group for its plugin and plan.

    Args:
        vllm_config: the server's, with its placement group.
        runtime_env: Ray's, of the workers.
        overwrites: as in ``Question``.

    Raises:
        RuntimeError: nodes differ from this one; with every such node.
    """
    if vllm_config.model_config is None or not is_duo(vllm_config):
        return
    question = payload(question_of(vllm_config, overwrites=overwrites))
    answers = ask_nodes(vllm_config.parallel_config.placement_group, question, runtime_env)
    expected = facts(**question["plan"])
    problems = []
    for node, answer in answers.items():
        problem = answer if isinstance(answer, str) else problem_of(answer, expected)
        if problem:
            host = "" if isinstance(answer, str) else f" ({answer['host']})"
            problems.append(f"  - node {node}{host}: {problem}")
    if problems:
        raise RuntimeError(
            "vllm-duo is not ready on every node of the Ray cluster:\n" + "\n".join(problems)
        )
    logger.info(
        "duo: %d node(s) of the Ray cluster have vllm-duo %s and mask %s: %s",
        len(answers),
        expected["vllm-duo"],
        expected["mask"],
        ", ".join(answers),
    )


def question_of(vllm_config: VllmConfig, *, overwrites: bool) -> Question:
    """What to ask the nodes of this server."""
    settings, model = vllm_config.additional_config, vllm_config.model_config
    parallel = vllm_config.parallel_config
    return Question(
        additional_config=settings if isinstance(settings, dict) else None,
        model=model.model,
        num_layers=model.get_total_num_hidden_layers(),
        num_kv_heads=model.get_total_num_kv_heads(),
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        windows=windows_of(model),
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        overwrites=overwrites,
    )


def ask_nodes(
    placement_group: Any, question: Mapping[str, Any], runtime_env: Mapping[str, Any]
) -> dict[str, dict[str, Any] | str]:
    """The answers of a placement group's nodes, by address; a sentence where there is none."""
    import ray
    from ray.util import placement_group_table
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = sorted(set(placement_group_table(placement_group)["bundles_to_node_id"].values()))
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    probe = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(make_probe())
    asked = {
        addresses[node]: probe.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            runtime_env=dict(runtime_env),
        ).remote(question)
        for node in nodes
    }
    answers: dict[str, dict[str, Any] | str] = {}
    for address, reference in asked.items():
        try:
            answers[address] = ray.get(reference, timeout=PATIENCE_S)
        except Exception as error:  # Ray has an error of its own for each way to fail
            answers[address] = f"it could not be asked ({type(error).__name__}: {error})"
    return answers
