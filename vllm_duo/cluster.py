"""Whether every node of a cluster would serve the same plan: the plugin, its version and the heads.

Imports no vLLM, so that a node answers quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from vllm_duo.kv_cache.ranks import PARTITION
from vllm_duo.plugin import PLUGIN_GROUP, PLUGIN_NAME
from vllm_duo.server_plan import make_plan
from vllm_duo.windows import Windows

ENVIRONMENT = ("VLLM_PLUGINS", PARTITION)
"""Variables of vLLM's that the plugin and its plan depend on."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a node is asked for: the arguments of ``make_plan``, and what its workers will be given.

    Attributes:
        additional_config: vLLM's.
        model: folder or Hugging Face id.
        num_layers: of the model.
        num_kv_heads: of one layer.
        tensor_parallel_size: ranks.
        pipeline_parallel_size: stages.
        windows: the model's own sliding windows that are in force, by layer.
        environment: what vLLM's executor sends of the asking process's variables that count here.
        overwrites: whether it puts them in the place of the node's own.
    """

    additional_config: Mapping[str, Any] | None
    model: str
    num_layers: int
    num_kv_heads: int
    tensor_parallel_size: int
    pipeline_parallel_size: int
    windows: Windows = ()
    environment: Mapping[str, str]
    overwrites: bool


def facts(
    additional_config: Mapping[str, Any] | None,
    model: str,
    num_layers: int,
    num_kv_heads: int,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    windows: Windows = (),
) -> dict[str, str]:
    """What all nodes must have alike, by name; the arguments are those of ``make_plan``.

    Raises:
        ValueError: there is no plan on this node.
    """
    plan = make_plan(
        additional_config,
        model,
        num_layers,
        num_kv_heads,
        tensor_parallel_size,
        pipeline_parallel_size,
        windows,
    )
    resolved = plan.resolved
    return {
        "vllm-duo": version("vllm-duo"),
        "mask": resolved.selection.mask_hash,
        "sink_size": str(resolved.sink_size),
        "recent_size": str(resolved.recent_size),
        "layers of each stage": ", ".join(map(str, plan.stage_sizes or (num_layers,))),
    }


def payload(question: Question) -> dict[str, Any]:
    """The question as plain data, which can be read without this package."""
    plan = asdict(question)
    environment, overwrites = plan.pop("environment"), plan.pop("overwrites")
    return {
        "plan": plan,
        "environment": environment,
        "overwrites": overwrites,
        "group": PLUGIN_GROUP,
        "name": PLUGIN_NAME,
    }


def make_probe() -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function that answers a ``payload`` on a node, in a process for this alone.

    It is made inside another so that pickle sends it whole: a node may lack this package.
    """

    def probe(question: Mapping[str, Any]) -> dict[str, Any]:
        import os
        import socket
        from importlib.metadata import entry_points

        for name, value in question["environment"].items():
            if question["overwrites"] or name not in os.environ:
                os.environ[name] = value
        answer: dict[str, Any] = {
            "host": socket.gethostname(),
            "plugins": os.environ.get("VLLM_PLUGINS"),
            "is_registered": bool(entry_points(group=question["group"], name=question["name"])),
        }
        try:
            from vllm_duo.cluster import facts

            answer["facts"] = facts(**question["plan"])
        except ImportError as error:
            answer["import_error"] = str(error)
        except Exception as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        return answer

    return probe


def problem_of(answer: Mapping[str, Any], expected: Mapping[str, str]) -> str | None:
    """Why a node cannot take part, if so.

    Args:
        answer: the probe's.
        expected: ``facts`` of the asking process.
    """
    wanted = expected["vllm-duo"]
    install = f"install vllm-duo=={wanted} there"
    if error := answer.get("import_error"):
        return f"vllm-duo cannot be imported ({error}): {install}"
    if not answer["is_registered"]:
        return (
            f"vllm-duo is on the path but not installed (no entry point {PLUGIN_NAME!r} in "
            f"{PLUGIN_GROUP!r}): {install}"
        )
    plugins = answer["plugins"]
    if plugins is not None and PLUGIN_NAME not in plugins.split(","):
        return (
            f"VLLM_PLUGINS={plugins!r} leaves vllm-duo out: add {PLUGIN_NAME} to it, or start Ray "
            "there without it"
        )
    if error := answer.get("error"):
        return f"it has no plan for this server ({error}): give every node the same folders"
    found = answer["facts"]
    if found["vllm-duo"] != wanted:
        return f"expected vllm-duo {wanted}, got {found['vllm-duo']}: {install}"
    differing = [
        f"expected {name} {value}, got {found.get(name)}"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if differing:
        return f"{'; '.join(differing)}: give every node the same pattern folder and environment"
    return None
